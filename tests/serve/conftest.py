"""A server with the tiny untrained model, on a socket of its own, and viewers that talk to it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="the extra `serve` is not installed: pip install -e '.[serve]'")

import httpx
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from memflow.serve.asgi import make_app
from memflow.serve.command import listen, server
from memflow.serve.settings import Settings

PROMPTS = ["bo, a red ball, jumps.", "mia, a white star, waits."]
PATIENCE = 60.0  # seconds for what takes an instant on a quiet machine


class Viewer:
    """A connection, and what came over it. messages: the texts; binaries: the bytes, one per chunk_metadata."""

    def __init__(self, socket: ClientConnection):
        self.socket = socket
        self.messages: list[dict[str, Any]] = []
        self.binaries: list[bytes] = []
        self.closed: int | None = None

    def send(self, type: str, **fields: Any) -> None:
        self.socket.send(json.dumps({"type": type, **fields}))

    def scene(self, prompt: str, event_id: str) -> None:
        self.send("session.interaction", interaction={"event_id": event_id, "event": {"prompt": prompt}})

    def next(self, timeout: float = PATIENCE) -> dict[str, Any] | None:
        """The next text message, with its binary where it has one; None: the connection is closed."""
        try:
            message = json.loads(self.socket.recv(timeout))
            self.messages.append(message)
            if message["type"] == "video.chunk_metadata":
                data = self.socket.recv(timeout)
                assert isinstance(data, bytes) and len(data) == message["byte_length"]
                self.binaries.append(data)
        except ConnectionClosed as closed:
            self.closed = closed.rcvd.code if closed.rcvd else 1006
            return None
        return message

    def until(self, type: str, count: int = 1) -> dict[str, Any]:
        """The `count`th message of this type from here on."""
        while (message := self.next()) is not None:
            count -= message["type"] == type
            if not count:
                return message
        raise AssertionError(f"closed with {self.closed} before {type}; last came {self.messages[-1:]}")

    def rest(self) -> list[dict[str, Any]]:
        """All that still comes."""
        before = len(self.messages)
        while self.next() is not None:
            pass
        return self.messages[before:]

    def silent(self, seconds: float) -> bool:
        try:
            self.next(seconds)
        except TimeoutError:
            return True
        return False


class Running:
    """A server in a thread."""

    def __init__(self, pipeline, settings: Settings):
        self.settings, self.app = settings, make_app(lambda: (pipeline, {}), settings)
        self.socket = listen("127.0.0.1", 0)
        self.port = self.socket.getsockname()[1]
        self.server = server(self.app, settings)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self.thread.start()
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=PATIENCE)
        self.wait(lambda: self.server.started)

    @property
    def stories(self):
        return self.app.state.stories

    def wait(self, condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it did not happen"
            time.sleep(0.02)

    @contextmanager
    def viewer(self, **options: Any) -> Iterator[Viewer]:
        address = f"ws://127.0.0.1:{self.port}/v1/realtime/video" + options.pop("query", "")
        with connect(address, max_size=None, open_timeout=PATIENCE, close_timeout=5, **options) as socket:
            yield Viewer(socket)

    @contextmanager
    def started(self, prompt: str | None = PROMPTS[0], *, seed: int = 0, **fields: Any) -> Iterator[Viewer]:
        with self.viewer() as viewer:
            viewer.send("session.start", **({} if prompt is None else {"prompt": prompt}), seed=seed, **fields)
            assert viewer.next()["type"] == "video.start", viewer.messages
            yield viewer

    def metric(self, name: str) -> float:
        for line in self.http.get("/metrics").text.splitlines():
            if line.startswith(f"memflow_{name} "):
                return float(line.split()[1])
        raise KeyError(name)

    def idle(self, seconds: float = PATIENCE) -> None:
        """Until no story is told, and nothing of one is left."""
        self.wait(lambda: self.metric("sessions") == 0, seconds)
        assert len(self.stories.teller) == 0 and self.stories.coming == 0 and self.stories.status == "ok"

    def film(self, id: str) -> bytes:
        return (self.settings.folder / f"{id}.mp4").read_bytes()

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()
        self.socket.close()
        self.http.close()


@pytest.fixture
def serve(toy, tmp_path) -> Iterator[Callable[..., Running]]:
    """Start a server; settings as keywords."""
    running: list[Running] = []

    def start(pipeline=toy, folder: Path | None = None, **settings: Any) -> Running:
        known = replace(Settings(folder=folder or tmp_path / "stories", model="noise"), **settings)
        running.append(Running(pipeline, known))
        return running[-1]

    yield start
    for one in running:
        if one.thread.is_alive():
            one.stop()


@pytest.fixture(scope="module")
def shared(toy, tmp_path_factory) -> Iterator[Running]:
    """One server for the tests of a module."""
    running = Running(toy, Settings(folder=tmp_path_factory.mktemp("stories"), model="noise"))
    yield running
    running.stop()


def upgrade(running: Running, **headers: str) -> bytes:
    """The request that asks for a WebSocket."""
    fields = {"Host": f"127.0.0.1:{running.port}", "Upgrade": "websocket", "Connection": "Upgrade"}
    fields |= {"Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==", "Sec-WebSocket-Version": "13"} | headers
    lines = [f"{name}: {value}" for name, value in fields.items()]
    return ("GET /v1/realtime/video HTTP/1.1\r\n" + "\r\n".join(lines) + "\r\n\r\n").encode()

"""Two Ray replicas and a folder: a replica is killed, and its stories go on at the other as if nothing had happened."""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
from functools import partial
from types import SimpleNamespace

import psutil
import pytest
import torch
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from memflow import MemFlowPipeline
from memflow.cli import main
from memflow.cli.options import Serving
from memflow.output.video import VideoWriter
from memflow.serve.command import _app, deployed, listen
from memflow.serve.settings import Settings
from tests.serve.conftest import PATIENCE, PROMPTS, Viewer

pytest.importorskip("ray.serve", reason="Ray Serve is not installed: pip install -e '.[ray]'")

from ray import serve

from memflow.tellers.actors import cluster

CHUNKS, SIZE = 12, 128


class Story(threading.Thread):
    """A viewer that stays to the end: where the connection is lost it comes again."""

    def __init__(self, address: str, seed: int):
        super().__init__(daemon=True)
        self.address, self.seed = address, seed
        self.id: str | None = None
        self.started, self.go_on = threading.Event(), threading.Event()
        self.connections = 0
        self.done: dict | None = None

    def run(self) -> None:
        end = time.monotonic() + 2 * PATIENCE
        while self.done is None and time.monotonic() < end:
            try:
                with connect(self.address, max_size=None, open_timeout=PATIENCE, close_timeout=1) as socket:
                    self.watch(Viewer(socket))
            except (OSError, ConnectionClosed, InvalidStatus):
                time.sleep(0.2)

    def watch(self, viewer: Viewer) -> None:
        begin = {"prompt": PROMPTS[0], "seed": self.seed, "num_frames": CHUNKS * 3, "width": SIZE, "height": SIZE}
        # What is shown is not said: after a second and a half of video it waits.
        begin = begin | {"streaming_buffer_seconds": 1.5} if self.id is None else {"memflow": {"resume": self.id}}
        viewer.send("session.start", **begin)
        if (start := viewer.next()) is None or start["type"] != "video.start":
            time.sleep(0.2)
            return
        self.id, self.connections = start["request_id"], self.connections + 1
        waits = "streaming_buffer_seconds" in begin
        while True:
            if waits and self.go_on.is_set():
                viewer.send("session.playback", position_seconds=1e6)  # all that was made
            try:
                message = viewer.next(0.1 if waits else PATIENCE)
            except TimeoutError:
                continue
            if message is None:
                return
            if message["type"] == "video.chunk_metadata":
                self.started.set()
            elif message["type"] == "session.done":
                self.done = message
                return


def wait(condition) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def replicas() -> list[psutil.Process]:
    """Of the cluster that this process has started."""
    children = psutil.Process().children(recursive=True)
    return [process for process in children if "ServeReplica" in process.name()]


def tellers(folder) -> dict[str, int]:
    """Which replica tells which story: it holds the journal."""
    found = {}
    for process in replicas():
        for file in process.open_files():
            if file.path.startswith(str(folder)) and file.path.endswith(".jsonl"):
                found[file.path.rpartition("/")[2].removesuffix(".jsonl")] = process.pid
    return found


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> list[bytes]:
    """The four stories, told alone."""
    pipe, made = MemFlowPipeline.from_preset("storybook"), []
    torch.set_num_threads(1)
    for seed in range(4):
        path = tmp_path_factory.mktemp("alone") / "film.mp4"
        seconds = CHUNKS * pipe.frames_per_chunk / pipe.fps
        stream = pipe.stream(PROMPTS[:1], seconds_per_prompt=seconds, seed=seed, height=SIZE, width=SIZE)
        with VideoWriter(path, pipe.fps) as video:
            for chunk in stream:
                video.write(chunk.frames[0].numpy())
        made.append(path.read_bytes())
    return made


def test_stories_of_a_killed_replica_go_on_at_the_other(tmp_path, films):
    folder = tmp_path / "stories"
    settings = Settings(folder=folder, save_every=2)
    with listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    address = f"ws://127.0.0.1:{port}/v1/realtime/video"
    with warnings.catch_warnings(), cluster("local"):
        warnings.simplefilter("ignore")  # of Ray's own code
        make = partial(_app, Serving(device="cpu"), settings)
        with deployed(make, 2, settings, host="127.0.0.1", port=port, takes={"num_cpus": 0.1}):
            stories = [Story(address, seed) for seed in range(4)]
            for story in stories:
                story.start()
                assert story.started.wait(PATIENCE)
            states = [folder / f"{story.id}.safetensors" for story in stories]
            wait(lambda: all(state.exists() for state in states))
            told = tellers(folder)
            assert sorted(told) == sorted(story.id for story in stories) and len(set(told.values())) == 2
            killed = told[stories[0].id]
            lost = [story for story in stories if told[story.id] == killed]
            psutil.Process(killed).kill()
            for story in stories:
                story.go_on.set()
            for story in stories:
                story.join(2 * PATIENCE)
                assert story.done is not None, story.seed
            assert all(story.connections > 1 for story in lost)
            for story, film in zip(stories, films, strict=True):
                told_film = (folder / f"{story.id}.mp4").read_bytes()
                assert told_film == film, (story.seed, story in lost, len(told_film), len(film))
            last = Story(address, 0)
            last.start()
            assert last.started.wait(PATIENCE)
        assert (folder / f"{last.id}.safetensors").exists()  # the servers were stopped, it was not
    film = folder / f"{last.id}.mp4"
    assert main(["generate", "--resume", str(film.with_suffix(".safetensors")), "-o", str(film)]) == 0
    assert film.read_bytes() == films[0]


def test_a_second_ctrl_c_waits_for_no_replica(monkeypatch, tmp_path):
    """The first one is being followed: replicas save, which may take two minutes."""
    gone, saved = threading.Event(), threading.Event()
    ended_by_deletion = []

    class Handle:
        def broadcast(self, name):
            return self

        def results(self, timeout_s):
            time.sleep(0.5)  # until the other thread waits for this one: earlier, the test would see nothing
            os.kill(os.getpid(), signal.SIGINT)
            ended_by_deletion.append(gone.wait(20))
            saved.set()

    nothing = SimpleNamespace(applications={})
    replaced = {"status": lambda: nothing, "start": lambda **_: None, "shutdown": lambda: None}
    replaced |= {"run": lambda *_, **__: Handle(), "delete": lambda _: gone.set()}
    for name, function in replaced.items():
        monkeypatch.setattr(serve, name, function)
    options = {"host": "127.0.0.1", "port": 0, "takes": {}}
    with pytest.raises(KeyboardInterrupt), deployed(lambda: None, 1, Settings(tmp_path), **options):
        pass
    assert saved.wait(PATIENCE) and ended_by_deletion == [True]

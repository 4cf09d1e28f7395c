"""A film can be fetched while it grows."""

import asyncio
import threading

from asynchronous import run
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.testclient import TestClient

from memflow.serve.asgi import _FilmSoFar


def test_a_film_that_grows_while_it_is_sent(tmp_path, monkeypatch):
    path = tmp_path / "film.mp4"
    path.write_bytes(bytes(range(256)) * 1024)
    began = path.read_bytes()
    grown = threading.Event()
    whole = _FilmSoFar.set_stat_headers

    def grow(response, stat):  # its length is known now
        whole(response, stat)
        with path.open("ab") as file:
            file.write(b"more" * 50_000)
        grown.set()

    monkeypatch.setattr(_FilmSoFar, "set_stat_headers", grow)
    client = TestClient(Starlette(routes=[Route("/film", lambda request: _FilmSoFar(path, media_type="video/mp4"))]))
    answer = client.get("/film")
    assert grown.is_set() and answer.status_code == 200
    assert answer.content == began and answer.headers["content-length"] == str(len(began))
    part = client.get("/film", headers={"range": "bytes=10-29"})
    assert part.status_code == 206 and part.content == began[10:30]
    assert client.get("/film", headers={"range": f"bytes={10**9}-"}).status_code == 416
    for wrong in ("bytes=abc", "lines=1-2"):
        assert client.get("/film", headers={"range": wrong}).status_code == 400


def test_a_host_that_could_send_files_itself(tmp_path):
    path = tmp_path / "film.mp4"
    path.write_bytes(b"film")
    sent = []

    async def send(message):
        sent.append(message)

    async def receive():
        await asyncio.sleep(60)

    extensions = {"http.response.pathsend": {}}
    scope = {"type": "http", "method": "GET", "path": "/film", "headers": [], "extensions": extensions}
    run(_FilmSoFar(path)(scope, receive, send))
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert sent[1]["body"] == b"film" and scope["extensions"] == extensions

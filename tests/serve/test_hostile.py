"""What somebody who means harm, or a program that is broken, may try: refused in words, and nobody else notices."""

from __future__ import annotations

import json
import socket
import struct
import time
from contextlib import ExitStack

import pytest
import torch
from websockets.exceptions import ConnectionClosed

from memflow.errors import MemFlowError
from memflow.serve.command import listen
from memflow.serve.command import serve as run_server
from tests.serve.conftest import PROMPTS, Running, upgrade


@pytest.mark.parametrize(
    "id", ["..", "%2e%2e%2fx", "a%00", "x" * 81, "video_stream-" + "0" * 32, "a.b", "%2Fetc%2Fpasswd"]
)
def test_ids_in_addresses_are_strict(shared, id):
    for path in (f"/v1/stories/{id}.mp4", f"/v1/stories/{id}", f"/v1/stories/{id}/chunks"):
        assert shared.http.get(path).status_code in (404, 405)
    assert shared.http.delete(f"/v1/stories/{id}").status_code in (404, 405)


@pytest.mark.parametrize(
    "text", ["", "{", "[" * 50_000, '{"a":' * 20_000, "[1]", '{"type": "session.stop"}', "x" * 150_000]
)
def test_starts_that_are_none(shared, text):
    with shared.viewer() as viewer:
        viewer.socket.send(text)
        error = viewer.next()
        assert (error["type"], error["code"]) == ("error", "bad_start") and len(error["message"]) < 300
        assert viewer.next() is None and viewer.closed == 1008


def test_a_start_of_ten_megabytes_is_cut_off(shared):
    with shared.viewer() as viewer, pytest.raises(ConnectionClosed) as closed:
        viewer.socket.send(json.dumps({"type": "session.start", "prompt": "x" * 10_000_000}))
        viewer.socket.recv(30)
    assert closed.value.rcvd is None or closed.value.rcvd.code == 1009  # or reset, before all of it was sent
    with shared.viewer() as viewer:
        viewer.socket.send(b"\0")
        assert viewer.next()["code"] == "bad_start"


def test_whoever_says_nothing_is_sent_away(serve):
    running = serve(start_seconds=0.3)
    with running.viewer() as viewer:
        assert viewer.next()["code"] == "bad_start" and viewer.next() is None and viewer.closed == 1008


def test_messages_that_are_none_and_a_story_that_goes_on(shared):
    with shared.started(streaming_buffer_seconds=0.2) as viewer:
        for text in (b"\1", "", "[" * 50_000, "3", '{"type": "dance"}', '{"type": "session.playback"}', "x" * 140_000):
            viewer.socket.send(text)
            assert viewer.until("error")["code"] == "bad_message"
        viewer.scene("x" * 2001, "a")
        assert viewer.until("error")["code"] == "bad_message"
        viewer.scene(PROMPTS[1], "a")
        viewer.until("session.interaction.queued")
        viewer.scene(PROMPTS[1], "a")
        error = viewer.until("error")
        assert (error["code"], error["event_id"]) == ("event_id_conflict", "a") and error["request_id"]
        viewer.send("session.start", prompt="again")
        assert viewer.until("error")["code"] == "bad_message"
        viewer.send("session.playback", position_seconds=100)
        viewer.until("video.chunk_metadata")


def test_a_flood_of_scenes(serve):
    running = serve(scenes_per_second=1.0)
    with running.started(streaming_buffer_seconds=0.2) as viewer:
        for n in range(14):
            viewer.scene(PROMPTS[n % 2], str(n))
        viewer.send("session.ping")
        viewer.until("session.pong")
        codes = [message.get("code", message["type"]) for message in viewer.messages]
        assert 10 <= codes.count("session.interaction.queued") <= 12 and codes.count("rate_limited") >= 2
        assert running.http.get("/metrics").text.count('errors_total{code="rate_limited"}') == 1


def test_a_flood_of_messages_is_read_slowly(serve):
    running = serve(messages_per_second=50)
    with running.started(streaming_buffer_seconds=0.2) as viewer:
        begin = time.monotonic()
        for _ in range(150):
            viewer.send("session.ping")
        viewer.until("session.pong", 150)
        assert time.monotonic() - begin > 1.5


def test_too_many_stories(serve):
    running = serve(sessions=2)
    with ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(running.started(streaming_buffer_seconds=0.2))
        with running.viewer() as viewer:
            viewer.send("session.start", prompt="bo")
            assert viewer.next()["code"] == "busy" and viewer.next() is None and viewer.closed == 1013
    running.idle()
    with running.started() as viewer:
        viewer.until("video.chunk_metadata")


def test_pictures_larger_than_the_models(shared, toy):
    with shared.viewer() as viewer:
        viewer.send("session.start", prompt="bo", width=toy.config.width * 2)
        assert "pixels" in viewer.next()["message"]
    with shared.viewer() as viewer:
        viewer.send("session.start", prompt="bo", width=7)
        assert "multiple" in viewer.next()["message"]
    assert not shared.stories.tellings


def test_a_story_has_an_end(serve):
    running = serve(story_seconds=1.0)
    with running.started(num_frames=10**6) as viewer:
        done = viewer.rest()[-1]
        assert done["memflow"]["reason"] == "limit" and done["chunks"] < 10


def test_a_disk_that_is_full(serve):
    running = serve(disk_bytes=1)
    with running.started(num_frames=30) as viewer:
        viewer.rest()
    running.idle()
    running.stories.disk = running.stories._swept()
    with running.viewer() as viewer:
        viewer.send("session.start", prompt="bo")
        assert viewer.next()["code"] == "disk_full" and viewer.next() is None and viewer.closed == 1011


def test_an_error_of_the_model_ends_one_story(serve, monkeypatch):
    running = serve()
    with running.started() as good, running.started() as bad:
        driver = running.stories.teller.stream(bad.messages[0]["request_id"]).driver
        monkeypatch.setattr(driver, "denoise", lambda latents, timestep: latents.broken)
        last = bad.rest()[-1]
        assert last["code"] == "failed" and "latents" not in last["message"] and bad.closed == 1011
        good.until("video.chunk_metadata", 3)
        driver = running.stories.teller.stream(good.messages[0]["request_id"]).driver

        def denoise(latents, timestep):
            raise torch.OutOfMemoryError("of 80 GiB")

        monkeypatch.setattr(driver, "denoise", denoise)
        assert good.rest()[-1]["code"] == "out_of_memory"
    with running.started() as viewer:
        viewer.until("video.chunk_metadata")


def test_a_reader_that_does_not_read_is_let_go(serve):
    running = serve(send_seconds=2.0)
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.connect(("127.0.0.1", running.port))
    raw.sendall(upgrade(running))
    assert raw.recv(4096).startswith(b"HTTP/1.1 101")
    raw.sendall(_frame(json.dumps({"type": "session.start", "prompt": "bo", "format": "jpeg"})))
    running.wait(lambda: len(running.stories.tellings) == 1)
    begin, made = time.monotonic(), -1
    while running.stories.metrics.chunks != made:  # until nothing is made any more: the reader's buffers are full
        made, begin = running.stories.metrics.chunks, time.monotonic()
        time.sleep(0.5)
    running.idle(20)
    assert time.monotonic() - begin < 10
    running.wait(lambda: not running.server.server_state.connections - _http(running), 15)
    raw.close()


def _http(running: Running) -> set:
    return {one for one in running.server.server_state.connections if "websocket" not in type(one).__module__}


def test_a_silent_viewer_is_let_go(serve):
    running = serve(stall_seconds=1.0)
    with running.started(streaming_buffer_seconds=0.1) as viewer:
        assert viewer.rest()[-1]["code"] == "stalled" and viewer.closed == 1000
    with running.started(streaming_buffer_seconds=0.1) as viewer:
        for _ in range(4):
            time.sleep(0.5)
            viewer.send("session.ping")
            viewer.until("session.pong")


def test_a_launcher_of_one_story_is_refused(monkeypatch):
    from memflow.cli.options import Serving

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(MemFlowError, match="serve: not under torchrun"):
        run_server(Serving(port=0))


def test_ports_that_are_taken():
    with listen("127.0.0.1", 0) as first, pytest.raises(MemFlowError, match="--port"):
        listen("127.0.0.1", first.getsockname()[1])


def _frame(text: str) -> bytes:
    data = text.encode()
    assert len(data) < 65536
    return b"\x81\xfe" + struct.pack(">H", len(data)) + bytes(4) + data

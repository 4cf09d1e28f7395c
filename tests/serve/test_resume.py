"""A viewer leaves, in whatever way; the story is saved, and goes on as if nothing had happened."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from asynchronous import run
from websockets.sync.client import connect

from memflow.serve import protocol
from memflow.serve.film import Film, remove
from memflow.serve.settings import Settings
from memflow.serve.stories import Stories
from tests.serve.conftest import PATIENCE, PROMPTS

FRAMES = 120


@pytest.fixture(scope="module")
def whole(shared) -> bytes:
    """The film of a story that was never interrupted: PROMPTS[0] alone."""
    with shared.started(num_frames=FRAMES, seed=5) as viewer:
        viewer.rest()
        id = viewer.messages[0]["request_id"]
    shared.idle()
    return shared.film(id)


def test_a_lost_connection_costs_nothing(shared, whole):
    with shared.started(num_frames=FRAMES, seed=5) as viewer:
        id = viewer.messages[0]["request_id"]
        viewer.until("video.chunk_metadata", 2)
        viewer.socket.socket.close()  # as when the cable is pulled, but for what the system still says
    shared.idle()
    known = shared.http.get(f"/v1/stories/{id}").json()
    assert known["state"] == "saved" and known["chunks"] >= 2
    seen = shared.film(id)
    with shared.started(None, memflow={"resume": id, "report": True}) as viewer:
        ours = viewer.messages[0]["memflow"]
        viewer.rest()
    assert ours["frames"] == known["frames"] and [scene["prompt"] for scene in ours["scenes"]] == [PROMPTS[0]]
    assert viewer.messages[0]["request_id"] == id and viewer.messages[-1]["memflow"]["reason"] == "told"
    assert viewer.messages[1]["memflow"]["start_frame"] == known["frames"]
    assert viewer.binaries[0][4:8] == b"ftyp"
    shared.idle()
    film = shared.film(id)
    assert film == whole
    header = film.index(b"moof") - 4
    assert film.startswith(seen[header:], header)
    chunks = shared.http.get(f"/v1/stories/{id}/chunks").json()["chunks"]
    assert [chunk["start_frame"] for chunk in chunks] == [n * chunks[0]["frames"] for n in range(len(chunks))]
    assert "thumbnail" in chunks[-1] and "thumbnail" not in chunks[0]


def test_whoever_removes_a_story_holds_it_until_its_files_are_gone(tmp_path, monkeypatch):
    """Another server may ask for it at any moment, and must not begin with half of it."""
    Film(tmp_path, "a", {"fps": 16, "width": 64, "height": 48, "frames_per_chunk": 3}).close()
    (tmp_path / "a.mp4").write_bytes(b"film")
    found, unlink = [], Path.unlink

    def unlink_while_another_asks(self, missing_ok=False):
        if self.suffix == ".mp4" and self.exists():
            with pytest.raises(BlockingIOError):
                Film(tmp_path, "a")
            found.append(self.name)
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink_while_another_asks)
    assert remove(tmp_path, "a") and remove(tmp_path, "a")  # whoever comes second finds nothing
    assert found == ["a.mp4"] and not list(tmp_path.iterdir())


def test_a_viewer_who_is_gone_before_the_first_chunk(shared, whole):
    with shared.started(num_frames=FRAMES, seed=5) as viewer:
        id = viewer.messages[0]["request_id"]
        viewer.send("session.pause")
    shared.idle()
    film = shared.settings.folder / f"{id}.mp4"
    with shared.started(None, memflow={"resume": id}) as viewer:
        assert viewer.rest()[-1]["type"] == "session.done"
    shared.idle()
    assert film.read_bytes() == whole


def test_a_story_goes_on_with_another_scene(shared):
    with shared.started() as viewer:
        id = viewer.messages[0]["request_id"]
        viewer.until("video.chunk_metadata")
    shared.idle()
    with shared.started(PROMPTS[1], memflow={"resume": id}) as viewer:
        assert viewer.until("video.chunk_metadata")["memflow"]["prompt"] == PROMPTS[1]
        viewer.send("session.save")
        saved = viewer.until("session.saved")
        assert saved["chunks"] >= 2 and saved["seconds"] > 0
        viewer.until("video.chunk_metadata")
    shared.idle()
    assert [scene["prompt"] for scene in shared.http.get(f"/v1/stories/{id}").json()["scenes"]] == PROMPTS


def test_a_page_that_is_loaded_again_takes_its_story_over(shared, whole):
    with shared.started(num_frames=FRAMES, seed=5, streaming_buffer_seconds=1.0) as first:
        id = first.messages[0]["request_id"]
        first.until("video.chunk_metadata")
        with shared.started(None, memflow={"resume": id}) as second:
            second.rest()
        last = first.rest()[-1]
        assert (last["type"], last["code"], first.closed) == ("error", "taken_over", 1000)
    shared.idle()
    assert shared.film(id) == whole


def test_several_at_once_ask_for_a_story(shared, whole):
    """One after the other takes it over; one goes on to the end."""
    with shared.started(num_frames=FRAMES, seed=5, streaming_buffer_seconds=0.5) as viewer:
        id = viewer.messages[0]["request_id"]
        viewer.until("video.chunk_metadata")
        with ExitStack() as stack:
            others = [stack.enter_context(shared.viewer()) for _ in range(4)]
            for other in others:
                other.send("session.start", memflow={"resume": id})
            last = [other.rest()[-1] for other in others]
    ends = sorted(message.get("code", message["type"]) for message in last)
    ended = [end for end in ends if end not in ("taken_over", "not_found")]  # not found: it came when all was told
    assert ended == ["session.done"], last
    shared.idle()
    assert shared.film(id) == whole


def test_what_is_not_there_cannot_go_on(shared):
    with shared.viewer() as viewer:
        viewer.send("session.start", memflow={"resume": "video_stream-" + "0" * 32})
        error = viewer.next()
        assert (error["type"], error["code"]) == ("error", "not_found")
        assert viewer.next() is None and viewer.closed == 1008


def test_a_damaged_state_says_nothing_of_where_it_lies(shared):
    with shared.started(num_frames=FRAMES, streaming_buffer_seconds=0.1) as viewer:
        viewer.until("video.chunk_metadata")
    shared.idle()
    id = viewer.messages[0]["request_id"]
    state = shared.settings.folder / f"{id}.safetensors"
    whole = state.read_bytes()
    state.write_bytes(whole[: len(whole) // 2])
    with shared.viewer() as viewer:
        viewer.send("session.start", memflow={"resume": id})
        error = viewer.next()
    assert error["code"] == "bad_start" and id in error["message"]
    assert str(shared.settings.folder) not in error["message"], error


def test_a_story_that_is_prepared_while_the_server_stops_is_saved(toy, tmp_path, monkeypatch):
    settings, asked, stopping = Settings(folder=tmp_path), threading.Event(), threading.Event()

    async def open_and_stop() -> None:
        async with Stories(toy, settings, {}) as stories:
            begin = stories.teller.begin

            def begin_late(*prompts, **given):
                asked.set()
                assert stopping.wait(PATIENCE)
                return begin(*prompts, **given)

            monkeypatch.setattr(stories.teller, "begin", begin_late)
            start = protocol.start({"type": "session.start", "prompt": PROMPTS[0]}, settings)
            opening = asyncio.create_task(stories.open(start))
            await asyncio.to_thread(asked.wait, PATIENCE)
            await stories.stop()
            stopping.set()
            telling = await opening
            assert telling.over and not stories.tellings and not len(stories.teller)
            assert stories.teller.path(telling.id).exists()

    run(open_and_stop())


def test_a_folder_that_is_gone_is_no_silent_end(serve):
    running = serve()
    running.settings.folder.rmdir()
    with running.viewer() as viewer:
        viewer.send("session.start", prompt=PROMPTS[0])
        error = viewer.next()
        assert error["code"] == "failed" and "folder of this server" in error["message"]
        assert str(running.settings.folder) not in error["message"]
        assert viewer.next() is None and viewer.closed == 1011
    running.settings.folder.mkdir()
    with running.started(num_frames=FRAMES) as viewer:
        viewer.until("video.chunk_metadata")


def test_a_server_that_is_stopped_saves_all(serve, toy, whole):
    running = serve()
    with ExitStack() as stack:
        viewers = [stack.enter_context(running.started(num_frames=FRAMES, seed=seed)) for seed in (5, 6)]
        id = viewers[0].messages[0]["request_id"]
        viewers[0].until("video.chunk_metadata")
        running.stop()
        for viewer in viewers:
            viewer.rest()
            assert viewer.closed == 1012, viewer.messages[-1]
    again = serve()
    with again.started(None, memflow={"resume": id}) as viewer:
        viewer.rest()
    again.idle()
    assert again.film(id) == whole


def test_a_process_that_is_killed_keeps_its_last_state(serve, whole):
    """What was made after the state is made again."""
    running = serve(save_every=4)
    with running.started(num_frames=FRAMES, seed=5) as viewer:
        id = viewer.messages[0]["request_id"]
        viewer.until("video.chunk_metadata", 6)
        state = running.settings.folder / f"{id}.safetensors"
        running.wait(state.exists)
        for path in running.settings.folder.iterdir():  # what a kill would leave
            copy = running.settings.folder.parent / "left" / path.name
            copy.parent.mkdir(exist_ok=True)
            copy.write_bytes(path.read_bytes())
    running.idle()  # the two share a model
    with open(copy.parent / f"{id}.jsonl", "ab") as journal:
        journal.write(b'{"chunk": ')  # in the middle of a line
    again = serve(folder=copy.parent)
    with again.started(None, memflow={"resume": id}) as viewer:
        assert (last := viewer.rest()[-1])["type"] == "session.done", last
    again.idle()
    assert again.film(id) == whole


def test_another_server_waits_until_the_story_is_saved(serve, shared, whole):
    """Two servers with one folder: what one tells the other cannot, and can as soon as it is saved."""
    first, second = serve(), serve()
    with first.started(num_frames=FRAMES, seed=5, streaming_buffer_seconds=0.5) as viewer:
        id = viewer.messages[0]["request_id"]
        viewer.until("video.chunk_metadata")
        assert second.http.delete(f"/v1/stories/{id}").status_code == 409
        with second.viewer() as other:
            other.send("session.start", memflow={"resume": id})
            time.sleep(0.5)
            viewer.socket.close()
            assert other.next()["type"] == "video.start"
            other.rest()
    second.idle()
    assert second.film(id) == whole


def test_stories_are_removed_when_they_are_old_or_unwanted(serve):
    running = serve(keep_seconds=3600)
    ids = []
    for _ in range(2):
        with running.started(num_frames=30) as viewer:
            viewer.until("video.chunk_metadata")
        ids.append(viewer.messages[0]["request_id"])
    running.idle()
    for path in running.settings.folder.glob(f"{ids[0]}.*"):
        os.utime(path, (time.time() - 3601,) * 2)
    assert running.stories._swept() > 0
    assert {path.stem for path in running.settings.folder.iterdir()} == {ids[1]}
    assert running.http.delete(f"/v1/stories/{ids[1]}").status_code == 204
    assert not list(running.settings.folder.iterdir())
    assert running.http.get(f"/v1/stories/{ids[1]}").status_code == 404


def test_the_command_line_goes_on_with_a_servers_story(tmp_path):
    """A process of its own: the embedded model, SIGTERM, and `memflow generate --resume` from what it left."""
    folder = tmp_path / "stories"
    command = [sys.executable, "-m", "memflow", "serve", "--dir", str(folder), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process, ExitStack() as stack:
        address = process.stdout.readline().split("http://")[1].split("/")[0]
        stack.callback(process.kill)
        with connect(f"ws://{address}/v1/realtime/video", max_size=None, open_timeout=PATIENCE) as socket:
            socket.send(json.dumps({"type": "session.start", "prompt": PROMPTS[0], "num_frames": 600}))
            id = json.loads(socket.recv())["request_id"]
            assert json.loads(socket.recv())["type"] == "video.chunk_metadata"
            process.terminate()
            while True:
                try:
                    socket.recv()
                except Exception as closed:
                    assert closed.rcvd.code == 1012
                    break
        assert process.wait(PATIENCE) == 0
    film = folder / f"{id}.mp4"
    left = film.read_bytes()
    arguments = ["generate", "--resume", str(folder / f"{id}.safetensors"), "-o", str(film), "--chunks", "1"]
    subprocess.run([sys.executable, "-m", "memflow", *arguments], check=True)
    header = left.index(b"moof") - 4
    assert len(film.read_bytes()) > len(left) and film.read_bytes()[header:].startswith(left[header:])

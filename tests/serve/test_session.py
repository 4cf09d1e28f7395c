"""What comes over the socket, and when: vLLM-Omni's messages in their order, and what is added to them."""

from __future__ import annotations

import io
import time
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from asynchronous import run
from PIL import Image
from starlette.applications import Starlette
from starlette.testclient import TestClient

from memflow import MemFlowPipeline
from memflow.cli.options import Dtype
from memflow.errors import MemFlowError
from memflow.serve import command
from memflow.serve.command import app_of_environment
from memflow.serve.film import memory_of
from memflow.serve.settings import Settings
from memflow.serve.stories import Stories
from tests.serve.conftest import PROMPTS


def frames_of(data: bytes) -> int:
    with av.open(io.BytesIO(data)) as film:
        return sum(1 for _ in film.decode(video=0))


def test_a_story_from_start_to_done(shared):
    with shared.started(num_frames=20, model="noise", guidance_scale=3.5, user="me") as viewer:
        start = viewer.messages[0]
        viewer.rest()
    assert start["format"] == "m4s" and start["request_id"].startswith("video_stream-")
    assert len(start["request_id"]) == len("video_stream-") + 32
    assert start["config"] == {
        "prompt": PROMPTS[0], "seed": 0, "num_frames": 20, "model": "noise", "guidance_scale": 3.5, "user": "me",
        "num_outputs_per_prompt": 1,
    }  # fmt: skip
    assert start["memflow"]["ignored"] == ["guidance_scale", "user"]
    *chunks, done = viewer.messages[1:]
    per_chunk = start["memflow"]["frames_per_chunk"]
    assert len(chunks) == -(-20 // per_chunk)
    for index, chunk in enumerate(chunks):
        wanted = {
            "type": "video.chunk_metadata", "request_id": start["request_id"], "kind": "media", "num_frames": per_chunk,
            "generation_chunk_index": index, "transport_chunk_index": index, "started_event_ids": [],
            "active_event_ids": [], "completed_event_ids": [],
        }  # fmt: skip
        assert {name: chunk[name] for name in wanted} == wanted
        assert chunk["memflow"]["start_frame"] == index * per_chunk and chunk["memflow"]["prompt"] == PROMPTS[0]
        assert chunk["memflow"]["mime"].startswith('video/mp4; codecs="avc1.')
        assert "memory" not in chunk["memflow"]
    wanted = {"type": "session.done", "request_id": start["request_id"], "chunks": len(chunks), "stopped": False}
    assert {name: done[name] for name in wanted} == wanted and done["memflow"]["reason"] == "told"
    assert viewer.closed == 1000
    film = b"".join(viewer.binaries)
    assert viewer.binaries[0][4:8] == b"ftyp" and all(data[4:8] == b"moof" for data in viewer.binaries[1:])
    assert frames_of(film) == len(chunks) * per_chunk
    kept = shared.http.get(f"/v1/stories/{start['request_id']}.mp4")
    header = len(viewer.binaries[0]) - len(film) or viewer.binaries[0].index(b"moof") - 4
    assert kept.content[header:] == film[header:]  # the total duration alone is filled in
    assert shared.http.get(f"/v1/stories/{start['request_id']}").json()["state"] == "told"


def test_scenes_begin_at_a_chunk_and_the_last_of_several_counts(shared):
    with shared.started() as viewer:
        viewer.until("video.chunk_metadata")
        viewer.send("session.pause", paused=True)
        viewer.until("session.paused")
        viewer.scene("nobody sees this", "a")
        viewer.send(
            "session.interaction",
            interaction={"event_id": "b", "event": {"prompt": PROMPTS[1]}, "transition_chunks": 3.0},
        )
        for event_id in "ab":
            queued = viewer.until("session.interaction.queued")
            assert queued["event_id"] == event_id and queued["memflow"]["cut"] is None
        viewer.send("session.pause", paused=False)
        while not (chunk := viewer.until("video.chunk_metadata"))["started_event_ids"]:
            assert chunk["memflow"]["prompt"] == PROMPTS[0]
        assert chunk["started_event_ids"] == chunk["active_event_ids"] == chunk["completed_event_ids"] == ["b"]
        assert chunk["memflow"]["switched"] and chunk["memflow"]["prompt"] == PROMPTS[1]
        assert chunk["memflow"]["dropped_event_ids"] == ["a"]
        assert viewer.until("video.chunk_metadata")["active_event_ids"] == []
        about = shared.http.get(f"/v1/stories/{viewer.messages[0]['request_id']}").json()
    assert [scene["prompt"] for scene in about["scenes"]] == PROMPTS
    assert about["scenes"][1]["chunk"] == chunk["generation_chunk_index"] and about["state"] == "telling"


def test_what_a_scene_loses_is_told_before_it_is_seen(shared, toy, tmp_path):
    length = toy.config.text_length
    prompt = "x" * (length - 1) + " and more"
    with shared.started() as viewer:
        viewer.scene(prompt, "a")
        assert viewer.until("session.interaction.queued")["memflow"] == {"unknown": [], "cut": "and more"}
    assert shared.http.post("/v1/check", json={"prompt": prompt}).json() == {
        "error": None,
        "unknown": [],
        "cut": "and more",
    }
    storybook = Stories(MemFlowPipeline.from_preset(), Settings(tmp_path), {})
    assert run(storybook.lost("bo, a zebra, jumps.")) == {"unknown": ["zebra"], "cut": None}
    assert "blank" in shared.http.post("/v1/check", json={"prompt": " "}).json()["error"]
    assert "2,000" in shared.http.post("/v1/check", json={"prompt": "x" * 2001}).json()["error"]
    assert shared.http.post("/v1/check", content=b"[" * 50_000).status_code == 400
    assert shared.http.post("/v1/check", content=b" " * 100_000).status_code == 413


def test_the_playhead_holds_back_what_is_made(shared):
    with shared.started(streaming_buffer_seconds=0.5) as viewer:
        rate, per_chunk = (viewer.messages[0]["memflow"][name] for name in ("fps", "frames_per_chunk"))
        most = int(0.5 * rate // per_chunk) + 1  # one chunk over is allowed
        for _ in range(most):
            viewer.until("video.chunk_metadata")
        assert viewer.silent(0.5)
        viewer.send("session.playback", position_seconds=most * per_chunk / rate)
        for _ in range(most):
            viewer.until("video.chunk_metadata")
        assert viewer.silent(0.5)
        viewer.send("session.playback", position_seconds=0)  # backwards counts for nothing
        assert viewer.silent(0.5)
        viewer.send("session.playback", position_seconds=1e9)  # beyond what is made neither
        viewer.until("video.chunk_metadata", most)
        assert viewer.silent(0.5)


def test_pause_stops_the_making(shared):
    with shared.started() as viewer:
        viewer.until("video.chunk_metadata", 2)
        viewer.send("session.pause")
        assert viewer.until("session.paused")["paused"] is True
        while not viewer.silent(0.5):
            pass
        made = shared.stories.teller.stream(viewer.messages[0]["request_id"]).position
        time.sleep(0.5)
        assert shared.stories.teller.stream(viewer.messages[0]["request_id"]).position == made
        viewer.send("session.pause", paused=False)
        viewer.until("video.chunk_metadata")


def test_a_story_that_is_stopped_says_so(shared):
    with shared.started() as viewer:
        viewer.until("video.chunk_metadata")
        viewer.send("session.stop")
        done = viewer.until("session.done")
        assert done["stopped"] is True and done["chunks"] == len(viewer.binaries)
        assert viewer.next() is None and viewer.closed == 1000
    about = shared.http.get(f"/v1/stories/{done['request_id']}").json()
    assert about["state"] == "saved" and about["kept_until"] > time.time() + 80_000


def test_ping(shared):
    with shared.started() as viewer:
        viewer.send("session.ping")
        assert viewer.until("session.pong") == {"type": "session.pong"}


def test_jpeg_for_players_without_mp4(shared):
    with shared.started(format="jpeg", num_frames=24, memflow={"report": True}) as viewer:
        about = viewer.messages[0]["memflow"]
        viewer.rest()
    chunks = viewer.messages[1:-1]
    assert len(chunks) == len(viewer.binaries) == about["frames_per_chunk"] * -(-24 // about["frames_per_chunk"])
    for index, (chunk, data) in enumerate(zip(chunks, viewer.binaries, strict=True)):
        assert chunk["num_frames"] == 1 and chunk["transport_chunk_index"] == chunk["memflow"]["start_frame"] == index
        assert Image.open(io.BytesIO(data)).size == (about["width"], about["height"])
        assert ("memory" in chunk["memflow"]) == (index % about["frames_per_chunk"] == 0)
    assert frames_of(shared.film(viewer.messages[0]["request_id"])) == len(chunks)  # the film is kept all the same


def test_the_memory_that_is_told_is_the_streams(shared, toy):
    settings = {"policy": "fifo", "bank_frames": 2, "top_k": 3}
    with shared.started(num_frames=100, seed=4, memflow={"report": True, "memory": settings}) as viewer:
        config = viewer.messages[0]["memflow"]["memory"]
        viewer.rest()
    assert {name: config[name] for name in settings} == settings
    stream = toy.stream([PROMPTS[0]], seed=4, memory=type(toy.memory_config).from_dict(config))
    per_chunk = stream.config.frames_per_chunk
    for message in viewer.messages[1:-1]:
        next(stream)
        told, snapshot = message["memflow"]["memory"], stream.snapshot()
        assert told == memory_of(snapshot, per_chunk)
        held = snapshot.held[:, 0]
        assert [entry["frame"] for entry in told["held"]] == sorted({int(n) for n in held.flatten() if n >= 0})
        for entry in told["held"]:
            layers = [row for row in held if entry["frame"] in row]
            assert entry["held"] == pytest.approx(len(layers) / len(held), abs=1e-3)
            worth = snapshot.relevance[:, 0][held == entry["frame"]]
            wanted = None if np.isnan(worth).all() else float(np.nanmean(worth))
            assert entry["relevance"] == pytest.approx(wanted, abs=1e-4)
        assert message["memflow"]["thumbnail"].startswith("data:image/jpeg;base64,")
    assert told["held"] and told["sink"]


def test_the_example_of_a_client(shared, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    from live_story import tell

    address = f"ws://127.0.0.1:{shared.port}/v1/realtime/video"
    id = run(tell(str(tmp_path / "live.mp4"), PROMPTS, address))
    assert frames_of((tmp_path / "live.mp4").read_bytes()) >= 4 * 16
    said = capsys.readouterr().out
    assert said.index(PROMPTS[0]) < said.index(PROMPTS[1])
    assert [scene["prompt"] for scene in shared.http.get(f"/v1/stories/{id}").json()["scenes"]] == PROMPTS


def test_what_prometheus_reads(shared):
    text = shared.http.get("/metrics").text
    samples = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    for name in ("sessions", "queue", "frames_total", "chunks_total", "frames_per_second", "disk_bytes"):
        assert float(samples[f"memflow_{name}"]) >= 0
    assert float(samples["memflow_frames_total"]) > 0 and float(samples['memflow_memory_bytes{where="host"}']) > 10**6
    buckets = [float(value) for name, value in samples.items() if name.startswith("memflow_chunk_seconds_bucket")]
    assert buckets == sorted(buckets) and buckets[-1] == float(samples["memflow_chunk_seconds_count"])
    kinds = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(kinds) == len(set(kinds)) and all(kind.startswith("memflow_") for kind in kinds)


def test_any_asgi_host_can_serve_the_app(monkeypatch, tmp_path):
    for name, value in {"DIR": str(tmp_path), "SESSIONS": "3", "TOKEN": "a-long-token", "DEVICE": "cpu"}.items():
        monkeypatch.setenv(f"MEMFLOW_SERVE_{name}", value)
    monkeypatch.setenv("MEMFLOW_SERVE_ALLOW_ORIGIN", "https://a.example https://b.example")
    import memflow.serve

    with TestClient(memflow.serve.app, base_url="https://b.example") as client:
        assert client.get("/v1/info").status_code == 401
        info = client.get("/v1/info", headers={"Authorization": "Bearer a-long-token"}).json()
        assert info["limits"]["sessions"] == 3 and info["model"] == "storybook"
        with client.websocket_connect("wss://b.example/v1/realtime/video?token=a-long-token") as socket:
            socket.send_json({"type": "session.start", "prompt": PROMPTS[0], "num_frames": 3})
            assert socket.receive_json()["type"] == "video.start"
            assert socket.receive_json()["byte_length"] == len(socket.receive_bytes())
            assert socket.receive_json()["type"] == "session.done"
    assert not hasattr(memflow.serve, "no such thing")
    assert isinstance(memflow.serve.app, Starlette)  # again: no module of this name hides it


@pytest.mark.parametrize(
    ("name", "text", "needed"),
    [
        *(("SESSIONS", text, "a whole number of at least 1") for text in ("abc", "0", "-1", "1.5", "")),
        *(("DTYPE", text, "one of float32, bfloat16, float16") for text in ("float", "manual_seed", "")),
        *(("PROMPT_CACHE", text, "one of 1, true, yes, 0, false, no") for text in ("off", "2", "")),
    ],
)
def test_an_environment_that_is_no_option(monkeypatch, tmp_path, name, text, needed):
    monkeypatch.setenv("MEMFLOW_SERVE_DIR", str(tmp_path))
    monkeypatch.setenv(f"MEMFLOW_SERVE_{name}", text)
    with pytest.raises(MemFlowError, match=f"MEMFLOW_SERVE_{name}: {needed} is needed, '{text}' came"):
        app_of_environment()


def test_the_environment_is_read_as_options(monkeypatch, tmp_path):
    read = []
    monkeypatch.setattr(command, "_app", lambda request, settings: read.append(request))
    monkeypatch.setenv("MEMFLOW_SERVE_DIR", str(tmp_path))
    for text, cached in (("False", False), ("no", False), ("1", True)):
        monkeypatch.setenv("MEMFLOW_SERVE_PROMPT_CACHE", text)
        monkeypatch.setenv("MEMFLOW_SERVE_DTYPE", "bfloat16")
        app_of_environment()
        assert (read[-1].prompt_cache, read[-1].dtype) == (cached, Dtype.bfloat16)


def test_another_policy_holds_what_it_shows(serve, toy, monkeypatch):
    own = replace(
        toy.memory_config, policy="prompt", held_frames=12
    )  # as the storybook's memory has more than it shows
    monkeypatch.setattr(type(toy), "memory_config", property(lambda self: own))
    running = serve()
    given = {"policy": "fifo"}, {"policy": "archive"}, {"policy": "none"}, {"policy": "prompt"}, {"bank_frames": 2}
    for memory, held in (
        *zip(given, (None, None, None, 12, 12), strict=True),
        ({"policy": "fifo", "held_frames": 9}, 9),
    ):
        with running.started(num_frames=1, memflow={"memory": memory}) as viewer:
            assert viewer.messages[0]["memflow"]["memory"]["held_frames"] == held
            viewer.rest()

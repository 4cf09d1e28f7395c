"""Many viewers at once, who come and go as they like: nobody starves, nothing is left behind, no story is lost."""

from __future__ import annotations

import gc
import hashlib
import random
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from types import SimpleNamespace

import psutil
import pytest
from asynchronous import run

from memflow.serve.protocol import Refused, Start
from memflow.serve.settings import Settings
from memflow.serve.stories import Stories
from tests.serve.conftest import PROMPTS, Running

SEEDS, FRAMES = 2, 96
# A viewer of its own process, which can be killed: it tells the id, then reads for ever.
KILLED = """
import json, sys
from websockets.sync.client import connect
with connect(sys.argv[1], max_size=None, open_timeout=60) as socket:
    socket.send(sys.argv[2])
    for message in socket:
        if isinstance(message, str) and json.loads(message)["type"] == "video.start":
            print(json.loads(message)["request_id"], flush=True)
"""


def watch(running: Running, seconds: float, count: int) -> list[int]:
    """Frames that each of `count` viewers got in `seconds`, all of them connected."""
    got, end, ready = [0] * count, threading.Event(), threading.Barrier(count + 1)

    def view(number: int) -> None:
        with running.started(PROMPTS[number % 2], seed=number, memflow={"report": True}) as viewer:
            ready.wait(60)
            while not end.is_set():
                got[number] += viewer.until("video.chunk_metadata")["num_frames"]
                viewer.messages.clear(), viewer.binaries.clear()  # its memory would be counted as the server's

    threads = [threading.Thread(target=view, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    ready.wait(60)
    before = list(got)
    time.sleep(seconds)
    after = list(got)
    end.set()
    for thread in threads:
        thread.join(60)
    return [late - early for early, late in zip(before, after, strict=True)]


def none_starves(got: list[int]) -> None:
    assert min(got) >= statistics.mean(got) / 2, got
    assert min(got) > 0, got


def test_eight_viewers_get_their_share(serve):
    running = serve()
    none_starves(watch(running, 5.0, 8))
    running.idle()


@pytest.mark.slow
def test_eight_viewers_for_three_minutes(serve):
    """Memory stays flat: what grows with a story is on disk."""
    running = serve()
    process, sizes = psutil.Process(), []
    done = threading.Event()

    def measure() -> None:
        while not done.wait(5.0):
            sizes.append(process.memory_info().rss)

    measuring = threading.Thread(target=measure)
    measuring.start()
    none_starves(watch(running, 180.0, 8))
    done.set()
    measuring.join()
    running.idle()
    third = len(sizes) // 3
    early, late = statistics.median(sizes[third : 2 * third]), statistics.median(sizes[2 * third :])
    print(f"memory: {early / 2**20:.0f} MiB in the second minute, {late / 2**20:.0f} MiB in the third")
    assert late - early < 20 * 2**20, sizes


@pytest.mark.parametrize("count", [12, pytest.param(200, marks=pytest.mark.slow)])
def test_viewers_that_come_and_go(serve, count):
    """Closed, dropped without a word, killed, taken over, stopped; each story is then told to its end by somebody."""
    running = serve(sessions=6)
    whole = {}
    for seed in range(SEEDS):
        with running.started(num_frames=FRAMES, seed=seed) as viewer:
            viewer.rest()
        running.idle()
        whole[seed] = _digest(running, viewer.messages[0]["request_id"])
    draw, left = random.Random(count), defaultdict(str)
    seeds = {}
    threads_before = threading.active_count()

    def come_and_go(number: int, kind: str, chunks: int, wait: float) -> None:
        seed = number % SEEDS
        with running.viewer() as viewer:
            viewer.send("session.start", prompt=PROMPTS[0], seed=seed, num_frames=FRAMES, streaming_buffer_seconds=1.0)
            if viewer.next()["type"] == "error":  # busy
                return
            id = viewer.messages[0]["request_id"]
            seeds[id] = seed
            for _ in range(min(chunks, 1)):
                viewer.until("video.chunk_metadata")
            time.sleep(wait)
            if kind == "dropped":
                viewer.socket.socket.close()
            elif kind == "stopped":
                viewer.send("session.stop")
                viewer.rest()
            elif kind == "taken over":
                with running.viewer() as other:
                    other.send("session.start", memflow={"resume": id})
                    time.sleep(wait)
            left[id] = kind

    def killed(number: int, wait: float) -> None:
        seed = number % SEEDS
        start = f'{{"type": "session.start", "prompt": "{PROMPTS[0]}", "seed": {seed}, "num_frames": {FRAMES}}}'
        address = f"ws://127.0.0.1:{running.port}/v1/realtime/video"
        command = [sys.executable, "-c", KILLED, address, start]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            id = process.stdout.readline().strip()
            time.sleep(wait)
            process.kill()
        if id:
            seeds[id], left[id] = seed, "killed"

    for begin in range(0, count, 6):
        print(f"viewer {begin}", flush=True)
        threads = []
        for number in range(begin, min(begin + 6, count)):
            wait = draw.random() * 0.5
            if number % 6 == 0:
                thread = threading.Thread(target=killed, args=(number, wait))
            else:
                kind = draw.choice(["closed", "dropped", "stopped", "taken over"])
                thread = threading.Thread(target=come_and_go, args=(number, kind, draw.randrange(3), wait))
            thread.start()
            threads.append(thread)
        for thread in threads:
            thread.join(120)
            assert not thread.is_alive()
    running.idle()
    gc.collect()
    assert running.metric("queue") == 0 and threading.active_count() <= threads_before + 2
    assert len(seeds) >= count / 2 and "killed" in left.values()
    for id, seed in seeds.items():
        if running.http.get(f"/v1/stories/{id}").json()["state"] == "saved":
            with running.started(None, memflow={"resume": id}) as viewer:
                last = viewer.rest()[-1]
                assert last["type"] == "session.done", last
            running.idle()
        assert _digest(running, id) == whole[seed], (id, left[id])
    assert not list(running.settings.folder.glob("*.safetensors"))


def _digest(running: Running, id: str) -> str:
    return hashlib.sha256(running.film(id)).hexdigest()


def test_a_story_that_is_told_to_its_end_is_not_taken_over(toy, tmp_path):
    """Its viewer is still to be told so, and whoever asks for it now comes too late."""

    async def asked_for() -> SimpleNamespace:
        async with Stories(toy, Settings(tmp_path), {}) as stories:

            async def leave():
                stories.tellings.pop("told", None)

            telling = stories.tellings["told"] = SimpleNamespace(over=True, taken=False, leave=leave)
            with pytest.raises(Refused, match="there is no such story to go on with"):
                await stories.open(Start(None, "m4s", resume="told"))
            return telling

    assert not run(asked_for()).taken

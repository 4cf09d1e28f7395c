"""A running `memflow generate` is stopped: by Ctrl-C, by Ctrl-C twice, and by kill -9."""

import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from films import NOISE, decode

from memflow.cli import main
from memflow.stream.chunks import ChunkDriver

SETTINGS = [
    "--model",
    NOISE,
    "-p",
    "A fox in the snow.",
    "-p",
    "The fox sleeps.",
    "--device",
    "cpu",
    "--height",
    "32",
    "--width",
    "32",
]
# diffusers loads only classes whose module has been imported.
PROGRAM = "import memflow_bench.untrained; from memflow.cli import run; run()"
LONG = [*SETTINGS, "--seconds-per-prompt", "1200"]


@pytest.fixture(scope="module")
def beginning(tmp_path_factory):
    """The first 20 chunks of the story, uninterrupted."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("whole") / "whole.mp4"
    assert main(["generate", *LONG, "-o", str(path), "--chunks", "20"]) == 0
    torch.set_num_threads(threads)
    return decode(path)


@pytest.fixture
def start(tmp_path):
    """Starts the story in a process of its own and waits until its video has more than `size` bytes."""
    processes = []

    def begin(*options, size=1_000):
        output = tmp_path / "fox.mp4"
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, "generate", *LONG, "-o", str(output), *map(str, options)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        processes.append(process)
        deadline = time.monotonic() + 60
        while not (output.exists() and output.stat().st_size > size):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.02)
        return process, output

    yield begin
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.communicate()


def same_beginning(frames, whole):
    """Whether both begin alike, as far as the shorter one goes (a slow machine makes few chunks, a fast one many)."""
    length = min(len(frames), len(whole))
    return length > 0 and np.array_equal(frames[:length], whole[:length])


def test_ctrl_c_finishes_the_chunk_and_saves_a_state_that_goes_on(start, tmp_path, beginning):
    process, output = start("--save-state", tmp_path / "state", "--report")
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopping after this chunk" in error and "Traceback" not in error
    chunks = int(re.search(r"stopped after chunk (\d+) of 3200", out).group(1))
    frames = decode(output)
    assert len(frames) == 12 * chunks
    assert same_beginning(frames, beginning)
    assert (tmp_path / "fox.png").exists()
    assert main(["generate", "--resume", str(tmp_path / "state"), "-o", str(output), "--chunks", "2"]) == 0
    resumed = decode(output)
    assert len(resumed) == 12 * (chunks + 2)
    assert same_beginning(resumed, beginning)


def test_a_second_ctrl_c_stops_at_once(tmp_path, capsys, monkeypatch):
    calls, denoise = [], ChunkDriver.denoise

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) in (10, 11):  # two different steps of the third chunk
            signal.raise_signal(signal.SIGINT)
        return denoise(*arguments)

    monkeypatch.setattr(ChunkDriver, "denoise", interrupted)
    output, state = tmp_path / "fox.mp4", tmp_path / "state"
    before = signal.getsignal(signal.SIGINT)
    assert main(["generate", *LONG, "-o", str(output), "--save-state", str(state)]) == 130
    assert signal.getsignal(signal.SIGINT) is before
    error = capsys.readouterr().err
    kept = f"{output} keeps the 24 frames made before; {state} was not written"
    assert "stopping after this chunk" in error and f"stopped at once; {kept}" in error
    assert len(decode(output)) == 24
    assert not state.exists()


def test_a_killed_process_leaves_a_playable_video(start, beginning):
    process, output = start(size=20_000)
    process.kill()
    process.communicate()
    frames = decode(output)
    assert len(frames) % 12 == 0
    assert same_beginning(frames, beginning)

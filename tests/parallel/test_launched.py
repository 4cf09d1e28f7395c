"""`memflow generate` under a launcher: the plain command's film, one message, one state, however it ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import together
from films import decode
from launched import Launch, written

from memflow.cli import main

PROMPTS = ["-p", "a red boat", "-p", "an owl in the fog"]
SIZE = ["--height", "32", "--width", "32", "--seconds-per-prompt", "2.25", "--device", "cpu", "--memory", "original"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder of a model with 12 heads: 2, 3, 4, 6 and 12 processes can share it."""
    folder = tmp_path_factory.mktemp("twelve")
    together.pipeline(heads=12).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def story(model):
    return ["generate", *PROMPTS, *SIZE, "--held", "4", "--top-k", "2", "--model", model]


@pytest.fixture(scope="module")
def whole(story, tmp_path_factory):
    """All six chunks, by one process."""
    folder = tmp_path_factory.mktemp("whole")
    assert Launch(1, [*story, "-o", folder / "whole.mp4"], folder).wait() == [0]
    return written(folder / "whole.mp4")


def alike(frames, expected):
    """Within one grey level; a shorter film is a beginning."""
    return len(frames) > 0 and np.abs(frames.astype(int) - expected[: len(frames)]).max() <= 1


def message(launch: Launch) -> str:
    """The one line that says what is wrong, whoever says it."""
    lines = [line for text in launch.said("err") for line in text.splitlines() if line.startswith("memflow:")]
    assert len(lines) == 1 and "Traceback" not in "".join(launch.said("err")), launch.said("err")
    return lines[0]


def test_a_state_of_two_resumes_on_one_and_on_three(story, whole, tmp_path):
    film, state = tmp_path / "film.mp4", tmp_path / "state"
    first = Launch(2, [*story, "-o", film, "--report", "--save-state", state, "--chunks", "2"], tmp_path)
    assert first.wait() == [0, 0], first.said("err")
    assert alike(written(film), whole) and len(decode(film)) == 24
    assert "after chunk 2 of 6" in first.said("out")[0] and first.said("out")[1] == ""
    assert film.with_suffix(".png").exists() and "an owl" not in "".join(first.said("err"))
    assert first.said("err")[1] == ""
    resume = ["generate", "--resume", state, "-o", film, "--device", "cpu"]
    assert Launch(1, [*resume, "--save-state", state, "--chunks", "2"], tmp_path).wait() == [0]
    three = Launch(3, resume, tmp_path)
    assert three.wait() == [0, 0, 0], three.said("err")
    assert len(decode(film)) == len(written(film)) == len(whole) == 72 and alike(written(film), whole)


@pytest.mark.parametrize("victim", [1, 0])
def test_a_killed_process_ends_all_with_one_message(story, whole, tmp_path, victim):
    film, state = tmp_path / "film.mp4", tmp_path / "state"
    long = [*story, "--seconds-per-prompt", "600", "-o", film, "--save-state", state, "--save-every", "1"]
    launch = Launch(3, long, tmp_path)
    launch.until(state, times=3)
    launch.processes[victim].kill()
    codes = launch.wait(30)
    assert codes[victim] == -signal.SIGKILL and set(codes) == {-signal.SIGKILL, 2}, launch.said("err")
    said = message(launch)
    assert "one of the 3 processes has ended without a word" in said
    assert victim == 0 or re.search(rf"\({film} keeps the \d+ frames made before; {state} keeps the state after", said)
    made = decode(film)
    assert len(made) % 12 == 0 and len(made) <= len(written(film)) and alike(written(film)[:36], whole)
    resumed = Launch(2, ["generate", "--resume", state, "-o", film, "--device", "cpu", "--chunks", "1"], tmp_path)
    assert resumed.wait() == [0, 0], resumed.said("err")
    assert 36 <= len(decode(film)) <= len(made) + 12


@pytest.mark.parametrize("target", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_sigterm_to_one_ends_all_after_the_chunk(story, whole, tmp_path, target):
    film, state = tmp_path / "film.mp4", tmp_path / "state"
    launch = Launch(2, [*story, "--seconds-per-prompt", "600", "-o", film, "--save-state", state], tmp_path)
    launch.until(film)
    launch.processes[target].terminate()
    assert launch.wait() == [130, 130], launch.said("err")
    chunks = int(re.search(r"stopped after chunk (\d+) of 1600", launch.said("out")[0]).group(1))
    assert len(decode(film)) == len(written(film)) == 12 * chunks and alike(written(film)[:36], whole)
    assert launch.said("out")[1] == "" and "memflow:" not in "".join(launch.said("err"))
    assert main(["generate", "--resume", str(state), "-o", str(film), "--device", "cpu", "--chunks", "1"]) == 0


@pytest.mark.parametrize("spoilt", [0, 1])
def test_an_error_in_one_ends_all_with_its_message(story, tmp_path, spoilt):
    launch = Launch(2, [*story, "-o", tmp_path / "film.mp4"], tmp_path, spoilt)
    assert launch.wait(60) == [2, 2]
    assert "the weights are damaged" in message(launch)
    assert len(decode(tmp_path / "film.mp4")) == 12


@pytest.mark.parametrize(
    ("size", "options", "expected"),
    [
        (5, [], r"5 processes cannot share a model of 12 heads: .*; 1, 2, 3, 4, 6, 12 would do"),
        (2, ["--height", "24", "--width", "24"], r"12 heads and calls of 27, 54 tokens: .*; 1, 3 would do"),
        (2, ["--memory", "nothing"], r"--memory nothing: there is no such memory"),
    ],
)
def test_what_cannot_be_is_said_once(story, tmp_path, size, options, expected):
    launch = Launch(size, [*story, *options, "-o", tmp_path / "film.mp4"], tmp_path)
    assert launch.wait() == [2] * size
    assert re.search(expected, message(launch))
    assert not (tmp_path / "film.mp4").exists()


def torchrun(size: int, *arguments) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command += ["--nproc-per-node", size, "-m", "memflow"]
    return subprocess.Popen([*map(str, (*command, *arguments))], stderr=subprocess.PIPE, text=True, env=environment)


def test_torchrun(tmp_path):
    """The launcher itself, and the model that comes with the package."""
    story = ["generate", "-p", "bo, a red ball, jumps.", "--chunks", "2", "--device", "cpu"]
    process = torchrun(2, *story, "-o", tmp_path / "shared.mp4")
    assert main([*story, "-o", str(tmp_path / "alone.mp4")]) == 0
    _, error = process.communicate(timeout=120)
    assert "storybook on 2 x cpu" in error
    shared, alone = decode(tmp_path / "shared.mp4"), decode(tmp_path / "alone.mp4")
    assert len(shared) == len(alone) and alike(shared, alone)


@pytest.mark.slow
@pytest.mark.parametrize("signalled", ["a process", "torchrun"])
def test_torchrun_ends_all(tmp_path, signalled):
    """torchrun stops the others with SIGTERM when one has been killed: what is said and kept is the same."""
    film, state = tmp_path / "film.mp4", tmp_path / "state"
    story = ["generate", "-p", "bo, a red ball, jumps.", "--seconds-per-prompt", "600", "--device", "cpu"]
    launcher = torchrun(2, *story, "-o", film, "--save-state", state, "--save-every", "1")
    deadline = time.monotonic() + 120
    while not state.exists():
        assert time.monotonic() < deadline and launcher.poll() is None
        time.sleep(0.05)
    if signalled == "torchrun":
        launcher.terminate()
    else:
        children = psutil.Process(launcher.pid).children()
        next(child for child in children if child.environ().get("RANK") == "1").kill()
    _, error = launcher.communicate(timeout=60)
    said = [line for line in error.splitlines() if line.startswith("memflow:")]
    expected = ["one of the 2 processes has ended without a word"] if signalled == "a process" else []
    assert len(said) == len(expected) and all(text in line for text, line in zip(expected, said, strict=True)), error
    made = decode(film)
    assert main(["generate", "--resume", str(state), "-o", str(film), "--device", "cpu", "--chunks", "1"]) == 0
    assert len(decode(film)) <= len(made) + 3

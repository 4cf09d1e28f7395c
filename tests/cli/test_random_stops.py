"""`memflow generate` is stopped at random moments: every video plays, every state is whole, every film can be ended.

Each run is a process of its own, forked from one that has imported all it needs: a moment at random is one of the
film's then, not of the imports.
"""

import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from films import decode

from memflow.cli import main

STORY = ["-p", "bo, a red star, jumps on the beach.", "-p", "mia, a blue ball, waits in the village."]
STORY += ["--seconds-per-prompt", "2.25", "--memory", "diverse"]
SIGNALS = {signal.SIGTERM: 130, signal.SIGINT: 130, signal.SIGKILL: -9}


def told(arguments: list[str], folder) -> None:
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", closefd=False) for descriptor in (1, 2))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    (folder / "begun").touch()
    code = main(arguments)
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


@pytest.fixture(scope="module")
def processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["memflow.cli.generate", "memflow.stream.pipeline", "memflow.output.video", __name__]
    )
    return context


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "whole.mp4"
    assert main(["generate", *STORY, "-o", str(path)]) == 0
    return decode(path), path.stat().st_size


def written(video: Path) -> int:
    """Bytes of a film; it comes and goes once before anything is made, to see whether it can be written."""
    try:
        return video.stat().st_size
    except FileNotFoundError:
        return 0


@pytest.mark.parametrize("count", [6, pytest.param(200, marks=pytest.mark.slow)])
def test_stopped_at_random_moments(processes, whole, tmp_path, count, monkeypatch, capsys):
    whole, size = whole
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    draw, met = random.Random(count), dict.fromkeys(("no film", "a film", "a state", "ended"), 0)
    for number in range(count):
        folder = tmp_path / str(number)
        folder.mkdir()
        video, state = folder / "film.mp4", folder / "state"
        arguments = ["generate", *STORY, "-o", str(video), "--save-state", str(state), "--save-every", "2"]
        process = processes.Process(target=told, args=(arguments, folder))
        process.start()
        kind = list(SIGNALS)[number % 3]
        while process.is_alive() and not (folder / "begun").exists():  # until then it is Python's start that is stopped
            time.sleep(0.005)
        # By what is written, however fast the machine is, and a moment more; some before anything is.
        wanted, deadline = draw.uniform(-0.2, 1.0) * size, time.monotonic() + 120
        while process.is_alive() and wanted > written(video):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.join(draw.uniform(0, 0.5))
        if process.is_alive():
            os.kill(process.pid, kind)
        process.join(60)
        said = (folder / "err").read_text() if (folder / "err").exists() else ""
        assert process.exitcode in (0, SIGNALS[kind], -kind), (process.exitcode, said)
        assert "Traceback" not in said, said
        left = sorted(path.name for path in folder.iterdir())
        if kind != signal.SIGKILL:
            assert not [name for name in left if name.startswith(".")], left
        met["ended"] += process.exitcode == 0
        if video.exists() and video.stat().st_size:
            frames = decode(video)
            assert np.array_equal(frames, whole[: len(frames)]), "a prefix of the film"
            met["a film"] += 1
        else:
            met["no film"] += 1
        if process.exitcode != 0 and state.exists():
            met["a state"] += 1
            capsys.readouterr()
            code = main(["generate", "--resume", str(state), "-o", str(video)])
            said = capsys.readouterr().err  # stopped after the last chunk: the film is whole, as is compared below
            assert code == 0 or (code == 2 and "told to its end, nothing is left" in said), said
        elif process.exitcode != 0:
            assert main(["generate", *STORY, "-o", str(video)]) == 0
        assert np.array_equal(decode(video), whole)
    print(met)
    assert met["a state"] > count // 8, met

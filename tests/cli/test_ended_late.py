"""What goes wrong after the last chunk, and a disk that is full at any size: film and state are what they are."""

import os
import signal
import subprocess
import sys

import pytest
from films import NOISE, decode
from PIL import Image

from memflow.cli import main
from memflow.output.timeline import Timeline

# Two prompts of two chunks.
STORY = ["-p", "A fox in the snow.", "-p", "The fox sleeps.", "--seconds-per-prompt", "1.5"]
STORY += ["--model", NOISE, "--device", "cpu", "--height", "32", "--width", "32"]
NAMES = ["fox.mp4", "fox.png", "state"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert main(["generate", *options(folder)]) == 0
    return [(folder / name).read_bytes() for name in NAMES]


def options(folder):
    return [*STORY, "-o", str(folder / "fox.mp4"), "--save-state", str(folder / "state"), "--report"]


def test_sigterm_while_the_report_is_drawn(tmp_path, monkeypatch, capsys, whole):
    def draw(self):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Timeline, "draw", draw)
    assert main(["generate", *options(tmp_path)]) == 130
    said = capsys.readouterr().err.splitlines()[-1]
    film, state = tmp_path / "fox.mp4", tmp_path / "state"
    kept = f"{film} keeps the 48 frames made before; {state} keeps the state after chunk 4 of 4"
    assert said == f"stopped at once; {kept}"
    assert film.read_bytes() == whole[0] and sorted(os.listdir(tmp_path)) == ["fox.mp4", "state"]


STOPPED = """
import os, sys
import memflow_bench.untrained
from memflow.output import report
whole = report.write_whole

def stopped(path, write):
    def half(file):
        write(file)
        file.flush()
        os.kill(os.getpid(), number)
    whole(path, half)

number, report.write_whole = int(sys.argv.pop(1)), stopped
from memflow.cli import run
run()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_stopped_while_the_report_is_written(tmp_path, number, whole):
    """The older report stays; the next run takes it for its own."""
    before, film = tmp_path / "fox.png", tmp_path / "fox.mp4"
    before.write_bytes(whole[1])
    command = [sys.executable, "-c", STOPPED, str(int(number)), "generate", *options(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == (130 if number == signal.SIGTERM else -9), ended.stderr
    assert "Traceback" not in ended.stderr
    assert before.read_bytes() == whole[1] and film.read_bytes() == whole[0]
    assert sorted(os.listdir(tmp_path)) == NAMES
    assert main(["generate", *options(tmp_path)]) == 0
    assert len(decode(film)) == 48 and Image.open(before).format == "PNG"


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("file", range(3), ids=NAMES)
def test_no_file_may_be_larger(tmp_path, capsys, whole, file, share):
    """By the system's limit for files, which a full disk resembles: one sentence, and what is there can be used."""
    resource = pytest.importorskip("resource", reason="this system has no limits for files")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = int(len(whole[file]) * share)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        code = main(["generate", *options(tmp_path), "--save-every", "1"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = capsys.readouterr().err.splitlines()[-1]
    assert code == 2 and said.startswith("memflow: ") and "File too large" in said, said
    film, state = tmp_path / "fox.mp4", tmp_path / "state"
    assert set(os.listdir(tmp_path)) <= set(NAMES)
    if state.exists():
        code, end = main(["generate", "--resume", str(state), "-o", str(film)]), capsys.readouterr().err
        assert code == 0 or "told to its end" in end
    else:
        assert main(["generate", *options(tmp_path)]) == 0
    assert film.read_bytes() == whole[0]

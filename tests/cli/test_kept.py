"""A film that cannot go on leaves what was made, the last state, and a sentence that says so."""

import json
import os
import re
import signal

import numpy as np
import pytest
import torch
from films import NOISE, decode

from memflow.cli import main
from memflow.errors import MemFlowError, MemFlowWarning
from memflow.output.report import MemoryReport
from memflow.output.video import VideoWriter
from memflow.stream.chunks import ChunkDriver
from memflow.stream.stream import Stream
from memflow_bench.untrained import noise_pipeline

# Two prompts of four chunks.
STORY = ["-p", "A fox in the snow.", "-p", "The fox sleeps.", "--seconds-per-prompt", "3"]
STORY += ["--model", NOISE, "--device", "cpu", "--height", "32", "--width", "32"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "fox.mp4"
    assert main(["generate", *STORY, "-o", str(path)]) == 0
    return path.read_bytes()


@pytest.fixture
def generate(tmp_path, capsys):
    """Runs the story with more options; returns code, the last line of stderr, video and state."""

    def run(*options, story=STORY):
        video, state = tmp_path / "fox.mp4", tmp_path / "state"
        code = main(["generate", *story, "-o", str(video), "--save-state", str(state), *options])
        return code, capsys.readouterr().err.splitlines()[-1], video, state

    return run


def fails_at(monkeypatch, kind, name, count, error):
    """From its `count`-th call on a method raises."""
    calls, method = [], getattr(kind, name)

    def failing(*arguments, **options):
        calls.append(1)
        if len(calls) >= count:
            raise error
        return method(*arguments, **options)

    monkeypatch.setattr(kind, name, failing)


def same_when_resumed(monkeypatch, video, state, whole):
    monkeypatch.undo()
    assert main(["generate", "--resume", str(state), "-o", str(video)]) == 0
    assert video.read_bytes() == whole


def test_a_full_disk_leaves_the_last_state_and_says_what_is_kept(generate, monkeypatch, whole):
    fails_at(monkeypatch, VideoWriter, "_append", 6, OSError(28, "No space left on device"))
    code, last, video, state = generate("--save-every", "2")
    assert code == 2
    assert last == (
        f"memflow: {video}: cannot be written: No space left on device ({video} keeps the 60 frames made before; "
        f"{state} keeps the state after chunk 4 of 8)"
    )
    assert len(decode(video)) == 60
    same_when_resumed(monkeypatch, video, state, whole)


def test_without_save_every_a_full_disk_leaves_the_video(generate, monkeypatch):
    fails_at(monkeypatch, VideoWriter, "_append", 3, OSError(28, "No space left on device"))
    code, last, video, state = generate()
    assert code == 2 and f"({video} keeps the 24 frames made before; {state} was not written)" in last
    assert len(decode(video)) == 24 and not state.exists()


@pytest.mark.parametrize("count", [2, 5])
def test_a_state_that_cannot_be_written_leaves_the_one_before(generate, monkeypatch, whole, count):
    fails_at(monkeypatch, Stream, "save", count, MemFlowError("the state cannot be written"))
    code, last, video, state = generate("--save-every", "2" if count == 2 else "1", "--chunks", "5")
    saved = {2: 2, 5: 4}[count]
    assert code == 2 and f"{state} keeps the state after chunk {saved} of 8" in last
    assert len(decode(video)) == 12 * (4 if count == 2 else 5)
    same_when_resumed(monkeypatch, video, state, whole)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            torch.OutOfMemoryError("tried to allocate"),
            "cpu is out of memory, --height and --width can be less: tried",
        ),
        (MemoryError("81 GiB"), "cpu is out of memory, --height and --width can be less: 81 GiB"),
        (KeyboardInterrupt(), "stopped at once"),
    ],
)
def test_what_ends_a_film_leaves_the_last_state(generate, monkeypatch, whole, error, said):
    fails_at(monkeypatch, ChunkDriver, "denoise", 25, error)  # the first step of chunk 7
    code, last, video, state = generate("--save-every", "3")
    assert code == (130 if isinstance(error, KeyboardInterrupt) else 2)
    assert said in last and f"{state} keeps the state after chunk 6 of 8" in last
    same_when_resumed(monkeypatch, video, state, whole)


def test_an_error_of_another_kind_is_a_defect_and_stays_one(generate, monkeypatch):
    fails_at(monkeypatch, ChunkDriver, "denoise", 1, RuntimeError("cannot allocate memory"))
    with pytest.raises(RuntimeError, match="cannot allocate memory"):
        generate()


def test_a_state_is_written_every_so_many_chunks(generate, monkeypatch):
    saved, save = [], Stream.save
    monkeypatch.setattr(Stream, "save", lambda self, *rest: saved.append(self.position) or save(self, *rest))
    assert generate("--save-every", "3")[0] == 0
    assert saved == [3, 6, 8]
    saved.clear()
    assert generate("--save-every", "4")[0] == 0
    assert saved == [4, 8]


def test_a_report_that_cannot_be_written_hides_no_other_error(generate, monkeypatch):
    fails_at(monkeypatch, MemoryReport, "save", 1, MemFlowError("fox.png: cannot be written"))
    code, last, video, _ = generate("--report", "--chunks", "1")
    assert code == 2 and "fox.png: cannot be written" in last and f"{video} keeps the 12 frames" in last
    fails_at(monkeypatch, ChunkDriver, "denoise", 5, MemoryError("81 GiB"))
    code, last, *_ = generate("--report")
    assert code == 2 and "81 GiB" in last


def test_sigterm_finishes_the_chunk_and_saves(generate, monkeypatch, whole):
    calls, denoise = [], ChunkDriver.denoise

    def terminated(*arguments):
        calls.append(1)
        if len(calls) == 10:
            os.kill(os.getpid(), signal.SIGTERM)
        return denoise(*arguments)

    monkeypatch.setattr(ChunkDriver, "denoise", terminated)
    code, last, video, state = generate()
    assert code == 130 and last.startswith("stopping after this chunk")
    frames = decode(video)
    assert len(frames) == 3 * 12
    same_when_resumed(monkeypatch, video, state, whole)
    assert np.array_equal(decode(video)[: len(frames)], frames)


LONG = "A fox in the snow " + "and further on " * 20


def test_a_prompt_that_is_cut_is_named_once(generate, tmp_path, capsys):
    path = tmp_path / "s.jsonl"
    path.write_text(json.dumps({"prompts": [LONG, "A hare.", LONG]}))
    small = [str(path), "--seconds-per-prompt", "0.1", *STORY[6:]]
    assert main(["generate", *small, "-o", str(tmp_path / "a.mp4")]) == 0
    error = capsys.readouterr().err
    assert len(re.findall("^memflow: the prompt has .*is cut off$", error, re.MULTILINE)) == 1


def test_the_python_interface_warns_too():
    pipe = noise_pipeline()
    with pytest.warns(MemFlowWarning, match=r"the prompt has 318 tokens, 128 are used: .*is cut off"):
        stream = pipe.stream([LONG], seconds_per_prompt=0.1, height=32, width=32)
    with pytest.warns(MemFlowWarning, match="is cut off"):
        stream.send(LONG)

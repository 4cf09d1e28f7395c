"""Stories from stdin, and scenes that are written while the film is made. Processes of their own: stdin is real."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time

import av
import pytest

from memflow.cli import main, terminal
from memflow.cli.story import read_stories
from memflow.cli.terminal import Lines
from memflow.errors import MemFlowError

FIRST = ["-p", "bo, a red ball, jumps.", "--seconds-per-prompt", "0.75"]  # 2 chunks


def start(*arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "memflow", "generate", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, bufsize=1)


def frames(path) -> int:
    with av.open(str(path)) as film:
        return sum(1 for _ in film.decode(video=0))


def test_lines_are_scenes_and_none_is_lost(tmp_path):
    """A pipe: all lines are there at once; each gets a chunk, as the story's beginning does; the last its seconds."""
    film = tmp_path / "a.mp4"
    process = start(*FIRST, "-o", str(film), "--live")
    said, errors = process.communicate("mia waits.\n\n" + "x" * 20_001 + "\nbo waits.\nmia jumps.\n", timeout=240)
    assert process.returncode == 0, errors
    told = re.findall(r"\d:\d\d  (.*)", errors)
    assert told == [FIRST[1], "mia waits.", "bo waits.", "mia jumps."]
    assert "at most 20,000 characters" in errors and "stopped" not in said
    assert frames(film) == 3 * (1 + 1 + 1 + 2)


def test_a_film_waits_for_the_next_scene_until_there_can_be_none(tmp_path):
    film = tmp_path / "a.mp4"
    with start(*FIRST, "-o", str(film), "--live") as process:
        try:
            lines = iter(process.stderr.readline, "")
            assert any("bo, a red ball" in line for line in lines)
            time.sleep(2)  # more than two chunks take: the plan is over
            assert process.poll() is None
            process.stdin.write("mia waits.\n")
            assert any("mia waits." in line for line in lines)
            process.stdin.close()
            process.stdin = None
            assert process.wait(120) == 0
        finally:
            process.kill()
    assert frames(film) == 3 * (2 + 2)


class Written:
    """A stream that notes what is sent. left: chunks that are planned."""

    def __init__(self, left: int):
        self.plan, self.sent, self.position = [None] * left, [], 1

    def send(self, prompt: str) -> None:
        self.sent.append(prompt)
        self.plan = [None] * 3


def lines_of(monkeypatch):
    ours, theirs = os.pipe()
    monkeypatch.setattr(sys, "stdin", open(ours))  # noqa: SIM115 (the reader's thread closes nothing)
    return Lines(), open(theirs, "w", buffering=1)


def test_one_line_before_each_chunk(monkeypatch):
    lines, typed = lines_of(monkeypatch)
    stream, said = Written(1), []
    typed.write("a\n \nb\n")
    time.sleep(0.3)
    lines.hand_over(stream, said.append, lambda: False)
    assert stream.sent == ["a"]
    lines.hand_over(stream, said.append, lambda: False)
    lines.hand_over(stream, said.append, lambda: False)  # nothing there, and chunks are planned: no waiting
    assert stream.sent == ["a", "b"]
    stream.plan = []
    threading.Timer(0.3, typed.write, ["c\n"]).start()
    lines.hand_over(stream, said.append, lambda: False)
    assert stream.sent == ["a", "b", "c"]
    stream.plan = []
    typed.close()
    lines.hand_over(stream, said.append, lambda: False)
    assert stream.sent == ["a", "b", "c"] and not said


def test_ctrl_c_ends_the_waiting(monkeypatch):
    lines, typed = lines_of(monkeypatch)
    end = time.monotonic() + 0.5
    lines.hand_over(Written(0), print, lambda: time.monotonic() > end)
    typed.close()


@pytest.mark.parametrize(
    ("text", "prompts"),
    [
        ("a\n\n b \n", [["a", "b"]]),
        ('["a", "b"]', [["a", "b"]]),
        ('{"prompts": ["a"]}', [["a"]]),
        ('[{"prompts": ["a"]}, {"prompts": ["b"]}]', [["a"], ["b"]]),
        ('{"prompts": ["a"]}\n{"prompts": ["b"]}\n', [["a"], ["b"]]),
    ],
)
def test_a_story_from_stdin(monkeypatch, tmp_path, text, prompts):
    (tmp_path / "story").write_text(text)
    monkeypatch.setattr(sys, "stdin", open(tmp_path / "story"))  # noqa: SIM115 (read_stories closes it)
    assert [story.prompts for story in read_stories("-")] == prompts


def test_stdin_that_holds_no_story(monkeypatch, tmp_path):
    (tmp_path / "story").write_text("")
    monkeypatch.setattr(sys, "stdin", open(tmp_path / "story"))  # noqa: SIM115 (read_stories closes it)
    with pytest.raises(MemFlowError, match="stdin: the file is empty"):
        read_stories("-")


LIVE = ["-p", "bo waits.", "--live", "--seconds-per-prompt", "0.375"]


@pytest.mark.parametrize("arguments", [pytest.param(LIVE, marks=pytest.mark.slow), ["-"]], ids=["live", "story"])
def test_stdin_that_is_closed(tmp_path, arguments):
    """Nothing comes from there: the film ends, and a story of nothing is said to be none."""
    command = [sys.executable, "-m", "memflow", "generate", *arguments, "-o", str(tmp_path / "a.mp4")]
    ended = subprocess.run(["sh", "-c", 'exec "$@" <&-', "sh", *command], capture_output=True, text=True, timeout=120)
    assert "Traceback" not in ended.stderr
    assert (ended.returncode, "file is empty" in ended.stderr) == ((2, True) if arguments == ["-"] else (0, False))


def test_lines_that_are_no_prompts(monkeypatch):
    """Bytes that are no text, and a line that is too long, are handed over to be refused, each alone and once; a mark
    that a file begins with is none of its letters."""
    monkeypatch.setattr(terminal, "_LINE", 8)
    ours, theirs = os.pipe()
    monkeypatch.setattr(sys, "stdin", open(ours, errors="strict"))  # noqa: SIM115 (the reader's thread closes nothing)
    lines, stream = Lines(), Written(1)
    with open(theirs, "wb") as typed:
        typed.write(b"\xef\xbb\xbfa\n\xff\n" + b"x" * 20 + b"\nb\n" + b"y" * 8 + b"\n")
    for _ in range(5):
        stream.plan = []
        lines.hand_over(stream, print, lambda: False)
    assert stream.sent == ["a", "\udcff", "x" * 8, "b", "y" * 8]


def test_stdin_without_end_is_read_as_it_is_used(monkeypatch):
    lines, typed = lines_of(monkeypatch)
    ended = threading.Event()

    def type_on():
        with contextlib.suppress(OSError):  # the test is over
            typed.write("a\n" * 100_000)
        ended.set()

    threading.Thread(target=type_on, daemon=True).start()
    stream = Written(0)
    lines.hand_over(stream, print, lambda: False)
    assert stream.sent == ["a"] and not ended.wait(0.5)


@pytest.mark.slow
def test_a_film_from_stdin(tmp_path):
    film = tmp_path / "a.mp4"
    process = start("-", "-o", str(film), "--seconds-per-prompt", "0.375")
    _, errors = process.communicate(json.dumps(["bo waits.", "mia waits."]), timeout=240)
    assert process.returncode == 0, errors
    assert frames(film) == 6


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-", "--live"], "the story must be a file"),
        (["STORY", "--live"], "--live is for one story"),
        (["STORY", "--live", "--jobs", "2"], "--live"),
    ],
)
def test_what_live_cannot_be_joined_with(tmp_path, capsys, arguments, said):
    story = tmp_path / "story.jsonl"
    story.write_text('{"prompts": ["bo"]}\n{"prompts": ["bo"]}\n')
    arguments = [str(story) if argument == "STORY" else argument for argument in arguments]
    assert main(["generate", *arguments, "-o", str(tmp_path / "films")]) == 2
    assert said in capsys.readouterr().err

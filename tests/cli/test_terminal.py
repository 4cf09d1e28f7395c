"""What a terminal cannot take is escaped, and what is said last never decides what became of the work."""

import json
import os
import signal
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest

from memflow.cli import Interrupt, doctor, main, run_app
from memflow.errors import MemFlowError, MemFlowWarning, shown

# A command that makes its film and then tells of it, as a process whose streams are as the shell left them.
FAKE = """
import sys
import memflow.cli
def work():
    with open(sys.argv[1], "w") as film:
        print("made: {text}")
        print("said: {text}", file=sys.stderr)
        film.write("the film")
    return int(sys.argv[2])
memflow.cli.main = work
memflow.cli.run()
"""


def process(film, redirect="", code=0, text="фильм", **environment):
    """Exit code, stdout and stderr of the command in a shell; the film is whole in any case."""
    program = film.with_suffix(".py")
    program.write_text(FAKE.format(text=text), encoding="utf-8")
    command = f"{sys.executable} {program} {film} {code} {redirect}"
    result = subprocess.run(command, shell=True, capture_output=True, env=os.environ | environment)
    assert film.read_text() == "the film"
    return result.returncode, result.stdout.decode(), result.stderr.decode()


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-8"])
def test_letters_that_an_encoding_lacks_are_escaped(tmp_path, encoding):
    said = "фильм" if encoding == "utf-8" else "\\u0444\\u0438\\u043b\\u044c\\u043c"
    assert process(tmp_path / "a", PYTHONIOENCODING=encoding) == (0, f"made: {said}\n", f"said: {said}\n")


@pytest.mark.parametrize("redirect", [">&-", "2>&-", "<&-", ">&- 2>&- <&-", ">/dev/full", "2>/dev/full", "&>/dev/full"])
@pytest.mark.parametrize("buffering", ["", "1"])
def test_streams_that_are_closed_or_full_leave_the_exit_code(tmp_path, redirect, buffering):
    for expected in (0, 2):
        redirect = redirect.replace("&>/dev/full", ">/dev/full 2>/dev/full")
        code, out, error = process(tmp_path / "a", redirect, expected, PYTHONUNBUFFERED=buffering)
        assert code == expected
        assert "Traceback" not in error and "Exception" not in error
        assert out in ("", "made: фильм\n")
        full = redirect == ">/dev/full"
        assert error in (
            "",
            "said: фильм\n" + full * "memflow: not everything could be printed: No space left on device\n",
        )


def test_a_reader_that_is_gone_is_no_error(tmp_path):
    code, _, error = process(tmp_path / "a", "| true; exit ${PIPESTATUS:-0}")
    assert code == 0 and "Broken" not in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\x1b[31mred", "\\x1b[31mred"),
        ("\x9b31m", "\\x9b31m"),
        ("a\x7f\x00\a\b", "a\\x7f\\x00\\x07\\x08"),
        ("two\nlines\rand\ttab", "two\\nlines\\rand\\ttab"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("\u2028\u2066\udce9", "\\u2028\\u2066\\udce9"),
        ("ä 狐 🦊 👩‍🚀 نص\u00a0.", "ä 狐 🦊 👩‍🚀 نص\u00a0."),
    ],
)
def test_what_could_command_a_terminal_is_escaped(text, expected):
    assert shown(text) == expected


HOSTILE = "\x1b]0;owned\x07\x9b2J\x7f"


def test_names_and_prompts_reach_no_terminal_as_they_are(tmp_path, capsys):
    stories = tmp_path / "s.jsonl"
    stories.write_text(json.dumps({"name": HOSTILE, "prompts": [f"bo jumps.{HOSTILE}"]}) + "\n")
    commands = [
        [str(stories), "-o", str(tmp_path / f"{HOSTILE}.mp4"), "--chunks", "1"],
        ["-p", "x", "-o", str(tmp_path / HOSTILE / "a.mp4")],
        ["-p", "x", "-o", str(tmp_path / "a.mp4"), "--model", HOSTILE],
        ["-p", "x", "-o", str(tmp_path / "b.mp4"), f"--{HOSTILE}"],
        [str(tmp_path / HOSTILE), "-o", str(tmp_path / "a.mp4")],
        [HOSTILE, HOSTILE, HOSTILE],
    ]
    codes = [main(["generate", *command]) for command in commands]
    assert codes == [0, 2, 2, 2, 2, 2]
    output = capsys.readouterr()
    for character in "\x1b\x07\x9b\x7f":
        assert character not in output.out + output.err
    assert "\\x1b]0;owned\\x07" in output.out and "\\x1b]0;owned\\x07" in output.err


def test_a_model_and_a_server_are_announced_escaped(capsys, monkeypatch):
    pytest.importorskip("uvicorn", reason="the extra `serve` is not installed: pip install -e '.[serve]'")
    from memflow.serve.command import _announce

    model = doctor.describe("memflow-1.3b")
    monkeypatch.setattr(doctor, "describe", lambda *_: model)
    assert main(["doctor", "--model", HOSTILE]) == 0
    _announce(HOSTILE, SimpleNamespace(token=None), "127.0.0.1", 1)
    said = capsys.readouterr().out
    assert said.count("\\x1b]0;owned\\x07\\x9b2J\\x7f") == 2 and not {"\x1b", "\x07", "\x9b", "\x7f"} & {*said}


def test_a_warning_is_said_once_and_others_as_usual(capsys):
    def app(*_, **__):
        for number in range(3):
            warnings.warn(f"the prompt is cut\nat {number % 2}", MemFlowWarning, stacklevel=1)

    assert run_app(app, [], "memflow") == 0
    assert capsys.readouterr().err == "memflow: the prompt is cut at 0\nmemflow: the prompt is cut at 1\n"
    with pytest.warns(UserWarning, match="another"):
        run_app(lambda *_, **__: warnings.warn("another", UserWarning, stacklevel=1), [], "memflow")


def test_an_error_of_many_lines_is_one_line(capsys):
    def app(*_, **__):
        raise MemFlowError("first\n   second\n")

    assert run_app(app, [], "memflow") == 2
    assert capsys.readouterr().err == "memflow: first second\n"


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_ask_first_and_then_stop(kind):
    if signal.getsignal(kind) == signal.SIG_IGN:
        pytest.skip("the tests run under nohup, which ignores it")
    before, told = signal.getsignal(kind), []
    with Interrupt() as interrupt:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(kind)  # nothing is in the making
        interrupt.notify = lambda: told.append(kind)
        signal.raise_signal(kind)
        assert interrupt.requested and told == [kind]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(kind)
    assert signal.getsignal(kind) is before


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupt():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)

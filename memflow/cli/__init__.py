"""The command `memflow`: what becomes of an error, and of a terminal that cannot take what is said."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import NoReturn

from memflow.errors import MemFlowError, missing_package, shown, warned


def main(arguments: list[str] | None = None) -> int:
    """Run `memflow`.

    Args:
        arguments: of the command line; None: those of the process.

    Returns:
        The exit code. 0: done. 2: something is wrong with what was given, said in one line on stderr. 130: stopped with
        Ctrl-C or SIGTERM.
    """
    arguments = _with_values(sys.argv[1:] if arguments is None else arguments)
    if named := _empty(arguments):
        return _fail(f"{named}: an empty value came; a variable of the shell that is not set?")
    if arguments[:1] == ["toy"]:
        return _fail("`memflow toy` is `python -m examples.storybook` now, in the repository of the project")
    try:
        app = import_module("memflow.cli.commands").app
    except ModuleNotFoundError as error:
        if arguments == ["doctor"]:  # says which packages are missing, without those that read options
            return import_module("memflow.cli.doctor").doctor() or 0
        return _missing(error)
    return run_app(app, arguments, "memflow")


def _with_values(arguments: list[str]) -> list[str]:
    """A bare `--ray` gets an empty value: typer has no options whose value may be missing."""
    followers = [*arguments[1:], "-"]
    return [
        "--ray=" if argument == "--ray" and after.startswith("-") else argument
        for argument, after in zip(arguments, followers, strict=False)
    ]


def _empty(arguments: list[str]) -> str | None:
    """What has an empty value: as a path it would be the folder one happens to be in, as a name the default."""
    for before, argument in zip(["memflow", *arguments], arguments, strict=False):
        if not argument:
            return before
        name, given, value = argument.partition("=")
        if name[:2] == "--" and given and not value and name != "--ray":
            return name
    return None


def run_app(app, arguments: list[str] | None, name: str) -> int:
    """Run a typer app called `name`; errors become one line on stderr, as `main` says."""
    import typer

    try:
        with warned(cache(_say)):  # each sentence once
            return app(arguments, prog_name=name, standalone_mode=False) or 0
    except (typer.Abort, KeyboardInterrupt):
        _say("stopped")
        return 130
    except MemFlowError as error:
        return _fail(str(error))
    except ModuleNotFoundError as error:
        return _missing(error)
    except Exception as error:
        # typer's usage errors; it has no public name for them that all its versions share.
        if not hasattr(error, "format_message"):
            raise
        return _fail(error.format_message())


def run() -> NoReturn:
    """`main` as a process of its own. Its exit code is that of the work: a terminal that is gone or a full disk under
    stdout is said on stderr, if that can be."""
    for number in range(3):  # a file opened later must not take the place of a closed stream, nor what is meant for it
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.stdin is None:  # it was closed: nothing comes from there
        sys.stdin = open(os.devnull)  # noqa: SIM115 (as long as the process)
    sys.stdout, sys.stderr = Patient(sys.stdout), Patient(sys.stderr)
    try:
        code = main()
    except KeyboardInterrupt:
        code = 130
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        if stream.error is not None and not isinstance(stream.error, BrokenPipeError):
            print(f"memflow: not everything could be printed: {stream.error.strerror}", file=sys.stderr)
    sys.exit(code)


class Patient:
    """A text stream that never fails: letters that it lacks are escaped, and an error of the system is kept.

    error: None, or the first OSError of a write.
    """

    def __init__(self, stream):
        self._stream = open(os.devnull, "w") if stream is None else stream  # noqa: SIM115 (as long as the process)
        self._stream.reconfigure(errors="backslashreplace")
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def _attempt(self, action) -> None:
        try:
            action()
        except OSError as error:
            self.error = self.error or error
            # What is still buffered is tried again at the end of the process, and may not fail there.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


class Interrupt:
    """Within the `with` block Ctrl-C, SIGTERM and the end of the terminal are a KeyboardInterrupt; the first one only
    sets `requested` where `notify` is a function, and calls it.

    shared: of several processes of one launcher none stops by itself: `requested` is all that is set, but by a second
    Ctrl-C. (torchrun sends SIGTERM when another one has ended, which then is about to say why.)
    """

    def __init__(self, shared: bool = False):
        self.shared = shared
        self.requested = False
        self.notify: Callable[[], None] | None = None

    def __enter__(self) -> Interrupt:
        kinds = [getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP")]
        # What `nohup` had ignored stays so.
        kinds = [kind for kind in kinds if kind and (kind.name != "SIGHUP" or signal.getsignal(kind) != signal.SIG_IGN)]
        self._before = {kind: signal.signal(kind, self._handle) for kind in kinds}
        return self

    def __exit__(self, *exception: object) -> None:
        for kind, handler in self._before.items():
            signal.signal(kind, handler)

    def _handle(self, number: int, frame: object) -> None:
        again, self.requested = self.requested, self.shared or self.requested
        if self.shared and not (again and number == signal.SIGINT):
            return
        if self.notify is None or again:
            raise KeyboardInterrupt
        self.requested = True
        self.notify()


def _missing(error: ModuleNotFoundError) -> int:
    message = missing_package(error)
    if message is None:
        raise error
    return _fail(message)


def _fail(message: str) -> int:
    _say(message)
    return 2


def _say(message: str) -> None:
    print("memflow:", shown(re.sub(r"\s*\n\s*", " ", message.strip())), file=sys.stderr)

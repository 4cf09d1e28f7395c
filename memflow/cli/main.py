"""The command `memflow`: its options are in `memflow.cli.commands`, and here is what becomes of an error."""

from __future__ import annotations

import atexit
import os
import sys
from contextlib import suppress
from typing import NoReturn

from memflow.errors import MemFlowError


def main(arguments: list[str] | None = None) -> int:
    """Run `memflow` with `arguments` (default: those of the process); returns the exit code.

    0: done. 2: something is wrong with what was given, said in one line on stderr. 130: stopped with Ctrl-C.
    """
    try:
        from memflow.cli.commands import app
    except ModuleNotFoundError as error:
        if (sys.argv[1:] if arguments is None else arguments) == ["doctor"]:
            return _doctor()
        return _missing(error)
    return run_app(app, arguments, "memflow")


def run_app(app, arguments: list[str] | None, name: str) -> int:
    """Run a typer app called `name`; errors become one line on stderr, as `main` says."""
    import typer

    try:
        return app(arguments, prog_name=name, standalone_mode=False) or 0
    except (typer.Abort, KeyboardInterrupt):
        print("memflow: stopped", file=sys.stderr)
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
    """`main` as a process of its own, which ends at once: Python takes up to two seconds to put torch and all away.

    What was registered with atexit runs, and all output is written.
    """
    code = main()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # whoever was to read it is gone
            stream.flush()
    os._exit(code)


def _doctor() -> int:
    """`memflow doctor` without the packages that read options: it tells which are missing."""
    from memflow.cli.doctor import collect, show

    show(collect())
    return 0


def _missing(error: ModuleNotFoundError) -> int:
    package = (error.name or "").split(".")[0]
    if package in ("", "memflow", "memflow_kernels"):
        raise error
    return _fail(f"this needs the package {package!r}: pip install 'memflow-kernels[model]'")


def _fail(message: str) -> int:
    print(f"memflow: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    run()

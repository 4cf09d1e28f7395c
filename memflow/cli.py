"""The command `memflow`: its options are in `memflow.commands`, and here is what becomes of an error."""

from __future__ import annotations

import sys

from memflow.errors import MemFlowError


def main(arguments: list[str] | None = None) -> int:
    """Run `memflow` with `arguments` (default: those of the process); returns the exit code.

    0: done. 2: something is wrong with what was given, said in one line on stderr. 130: stopped with Ctrl-C.
    """
    try:
        import typer

        from memflow.commands import app
    except ModuleNotFoundError as error:
        if (sys.argv[1:] if arguments is None else arguments) == ["doctor"]:
            return _doctor()
        return _missing(error)
    try:
        return app(arguments, prog_name="memflow", standalone_mode=False) or 0
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


def _doctor() -> int:
    """`memflow doctor` without the packages that read options: it tells which are missing."""
    from memflow.doctor import collect, show

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
    sys.exit(main())

"""Runs a build in a folder: ninja, its progress, and the compiler's first error."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TextIO

from .errors import BuildError
from .recipe import Recipe

_STEP = re.compile(r"\[\d+/\d+\]")
# "file.cu(12): error: ...", "file.cpp:3:10: fatal error: ...", "nvcc fatal   : ...", "ptxas error   : ..."
_ERROR = re.compile(r"\b(error|fatal)\b\s*(#\S*\s*)?:|: undefined reference|cannot find -l", re.IGNORECASE)


def first_error(output: list[str]) -> str:
    """The line in which a compiler, linker or ninja first says what is wrong; the last line where none does."""
    lines = [line.strip() for line in output if line.strip()]
    return next((line for line in lines if _ERROR.search(line)), lines[-1] if lines else "it said nothing")


def compile_library(recipe: Recipe, folder: Path, name: str) -> Path:
    """Build the library `name` in `folder`, an empty one; a progress line goes to stderr. Returns its path.

    What the compiler says is kept in build.log there. Raises BuildError with its first error.
    """
    library = folder / name
    (folder / "build.ninja").write_text(recipe.ninja_file(library))
    with (
        Progress(f"with nvcc {recipe.toolchain.version} for {recipe.target_names}") as progress,
        open(folder / "build.log", "w") as log,
    ):
        status, output = _run(recipe.toolchain.ninja, folder, progress, log)
    if status or not library.is_file():
        raise BuildError(first_error(output))
    return library


class Progress:
    """One line on stderr: in a terminal it changes with every finished step, in a log it stays as it began."""

    def __init__(self, how: str):
        self.how, self.changes = how, sys.stderr.isatty()

    def __enter__(self) -> Progress:
        self._print("")
        return self

    def show(self, line: str) -> None:
        """`line`: what ninja said; only the beginning of a step, [2/9], counts."""
        step = _STEP.match(line)
        if step and self.changes:
            self._print(f" {step[0]}")

    def __exit__(self, *error: object) -> None:
        if self.changes:
            print(file=sys.stderr, flush=True)

    def _print(self, step: str) -> None:
        text = f"memflow: building the CUDA kernels{step} {self.how}"
        if self.changes:  # a line that fills the width would begin another
            text = f"\r{text[: shutil.get_terminal_size().columns - 1]}"
        print(text, end="" if self.changes else "\n", file=sys.stderr, flush=True)


def _run(ninja: str, folder: Path, progress: Progress, log: TextIO) -> tuple[int, list[str]]:
    """Exit code and lines of the output, which go into the log as they come."""
    jobs = os.environ.get("MAX_JOBS", "")
    try:
        process = subprocess.Popen(
            [ninja, *(["-j", jobs] if jobs.isdigit() else [])],
            cwd=folder,
            env={**os.environ, "NINJA_STATUS": "[%f/%t] "},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise BuildError(f"{ninja} does not run: {error}") from error
    output = []
    with process:
        try:
            for line in process.stdout:
                log.write(line)
                output.append(line)
                progress.show(line)
        except BaseException:  # Ctrl-C: the compilers stop too
            process.terminate()
            raise
    return process.returncode, output

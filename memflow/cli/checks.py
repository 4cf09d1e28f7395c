"""What can be seen to be wrong with a request before anything that takes long: its settings, the files it writes."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from memflow.cli.options import MEMORIES, Request
from memflow.errors import MemFlowError
from memflow.output import check_regular, check_writable

if TYPE_CHECKING:
    from memflow.cli.story import Job


def check_settings(request: Request) -> None:
    """Raise MemFlowError for settings of the stories that can be seen to be wrong without a model."""
    seconds = request.seconds_per_prompt
    if seconds is not None and not (seconds > 0 and math.isfinite(seconds)):
        raise MemFlowError(f"--seconds-per-prompt must be above 0, got {seconds}")
    if request.memory == "reference":
        raise MemFlowError("--memory reference is called --memory published now")
    if request.memory not in (None, *MEMORIES):
        raise MemFlowError(f"--memory {request.memory}: there is no such memory; there are {', '.join(MEMORIES)}")
    if request.decoder is not None:
        check_regular(request.decoder)
    if request.report:
        import memflow.output.report  # noqa: F401 (a matplotlib that does not start says so now)


def check_files(request: Request, jobs: list[Job]) -> None:
    """Raise MemFlowError for files that cannot be written, or that something else has made."""
    from memflow.output.video import check_output, is_ours

    written = [path for job in jobs for path in (job.output, job.report) if path]
    written += [request.save_state] if request.save_state else []
    names = [os.path.realpath(path) for path in (request.story, request.decoder, *written) if path]
    for path in written:
        if names.count(os.path.realpath(path)) > 1:
            raise MemFlowError(f"{path}: is named twice, and one of its contents would overwrite the other")
    with made_folders(*([request.output] if len(jobs) > 1 else [])):
        for job in jobs:
            check_output(job.output)
            _keep_foreign(job.output, is_ours, request.overwrite or request.resume)
            if job.report is not None:
                check_report(job.report, request.overwrite)
        if request.save_state is not None:
            check_writable(request.save_state)
            _keep_foreign(request.save_state, _is_state, request.overwrite)


def check_report(path: Path, overwrite: bool) -> None:
    """Raise MemFlowError for a picture that cannot be written, or that something else has made."""
    from memflow.output.report import is_ours

    check_writable(path)
    _keep_foreign(path, is_ours, overwrite)


@contextmanager
def made_folders(*paths: Path) -> Iterator[None]:
    """Inside the folders are there, each in the one before. Those that were not and are empty at the end go
    again: it may come before anything is written."""
    made: list[Path] = []
    try:
        for path in paths:
            try:
                there = path.is_dir() or path.mkdir(exist_ok=True)
            except OSError as error:
                raise MemFlowError(f"{path}: the folder cannot be made: {error.strerror}") from None
            if not there:
                made.insert(0, path)
        yield
    finally:
        for path in made:
            with suppress(OSError):  # something is in it
                path.rmdir()


def _keep_foreign(path: Path, is_ours: Callable[[Path], bool], overwrite: bool) -> None:
    if not overwrite and path.exists() and path.stat().st_size and not is_ours(path):
        raise MemFlowError(f"{path}: is there and memflow did not make it; --overwrite replaces it")


def _is_state(path: Path) -> bool:
    from memflow.stream.saved import read_header

    try:
        read_header(path, digest=False)
    except MemFlowError:
        return False
    return True

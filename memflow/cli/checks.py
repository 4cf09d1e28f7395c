"""What can be seen to be wrong with a request before anything that takes long: its settings, the files it writes."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
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


def check_files(request: Request, jobs: list[Job]) -> None:
    """Raise MemFlowError for files that cannot be written, or that something else has made."""
    from memflow.output.video import check_output, is_ours

    written = [path for job in jobs for path in (job.output, job.report) if path]
    written += [request.save_state] if request.save_state else []
    names = [os.path.realpath(path) for path in (request.story, request.decoder, *written) if path]
    for path in written:
        if names.count(os.path.realpath(path)) > 1:
            raise MemFlowError(f"{path}: is named twice, and one of its contents would overwrite the other")
    with made_folder(request.output) if len(jobs) > 1 else nullcontext():
        for job in jobs:
            check_output(job.output)
            _keep_foreign(job.output, is_ours, request.overwrite or request.resume)
            if job.report is not None:
                from memflow.output.report import is_ours as is_report

                check_writable(job.report)
                _keep_foreign(job.report, is_report, request.overwrite)
        if request.save_state is not None:
            check_writable(request.save_state)
            _keep_foreign(request.save_state, _is_state, request.overwrite)


@contextmanager
def made_folder(path: Path) -> Iterator[None]:
    """Make the folder, unless it is there; where the block fails it is as if nothing had been."""
    try:
        there = path.is_dir()
        path.mkdir(exist_ok=True)
    except OSError as error:
        raise MemFlowError(f"{path}: the folder cannot be made: {error.strerror}") from None
    try:
        yield
    except MemFlowError:
        if not there:
            path.rmdir()
        raise


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

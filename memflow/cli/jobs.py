"""The videos that a request makes, checked before anything that takes long."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from memflow.cli.options import MEMORIES, Request
from memflow.cli.story import Story, check_prompts, read_stories
from memflow.errors import MemFlowError
from memflow.output import check_regular, check_writable


@dataclass(frozen=True)
class Job:
    """One video. story: None = the one in the state that is resumed. state: what that state's file says of it."""

    story: Story | None
    output: Path
    report: Path | None
    state: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.story.name if self.story else self.state["name"]


def jobs(request: Request) -> list[Job]:
    """The videos to make. MemFlowError for what cannot work and can be seen without loading a model."""
    if request.output is None:
        raise MemFlowError("where to? -o OUT.mp4 is needed (a folder if the story file holds several stories)")
    check_settings(request)
    if request.live and str(request.story) == "-":
        raise MemFlowError("--live reads further scenes from stdin: the story must be a file, or come with -p")
    if request.save_every is not None and request.save_state is None:
        raise MemFlowError("--save-every says how often the state is written, --save-state FILE where: it is missing")
    found = _resumed(request) if request.resume else _told(request)
    _check_files(request, found)
    return found


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


def _resumed(request: Request) -> list[Job]:
    if given := request.given_again():
        raise MemFlowError(f"--resume takes story, seed and settings from the state: leave out {', '.join(given)}")
    if request.overwrite and not request.report:
        raise MemFlowError("--overwrite does nothing with --resume: an OUT that is there is continued")
    from memflow.stream.saved import read_header

    check_regular(request.resume)
    header = read_header(request.resume)
    missing = {"name", "model", "dtype", "video_frames", "video_checksum"} - set(header["extra"])
    if missing:
        raise MemFlowError(
            f"{request.resume}: not saved by `memflow generate` (it does not tell {', '.join(sorted(missing))})"
        )
    if header["plan"]["remaining"] == 0 and not header["plan"]["queue"]:
        raise MemFlowError(f"{request.resume}: this story has been told to its end, nothing is left to generate")
    return [_job(request, None, request.output, header["extra"])]


def _told(request: Request) -> list[Job]:
    if request.story is not None and request.prompts:
        raise MemFlowError("give the story either as a file or with -p, not both")
    if request.story is None and not request.prompts:
        raise MemFlowError("which story? Give a story file, or prompts with -p")
    if request.prompts:
        return [_job(request, Story(request.output.stem, check_prompts(list(request.prompts), "-p")), request.output)]
    stories = read_stories(request.story)
    if len(stories) == 1:
        return [_job(request, stories[0], request.output)]
    if request.live:
        raise MemFlowError(f"--live is for one story, {request.story} holds {len(stories)}")
    if request.output.suffix.lower() == ".mp4":
        raise MemFlowError(f"{request.story} holds {len(stories)} stories: -o must be a folder, not {request.output}")
    if request.save_state is not None:
        raise MemFlowError(f"--save-state is for one story, {request.story} holds {len(stories)}")
    return [_job(request, story, request.output / f"{story.name}.mp4") for story in stories]


def _job(request: Request, story: Story | None, output: Path, state: dict[str, str] | None = None) -> Job:
    return Job(story, output, output.with_suffix(".png") if request.report else None, state or {})


def _check_files(request: Request, jobs: list[Job]) -> None:
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
                check_writable(job.report)
                _keep_foreign(job.report, _is_report, request.overwrite)
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


def _is_report(path: Path) -> bool:
    from memflow.output.report import is_ours

    return is_ours(path)


def _is_state(path: Path) -> bool:
    from memflow.stream.saved import read_header

    try:
        read_header(path, digest=False)
    except MemFlowError:
        return False
    return True

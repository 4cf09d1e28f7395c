"""What `memflow generate` was asked for, checked before anything that takes long: `Request` in, `Job`s out."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from memflow.cli.story import Story, check_prompts, read_stories
from memflow.errors import MemFlowError

_FROM_STATE = ("story", "prompts", "seconds_per_prompt", "seed", "height", "width", "memory", "held", "top_k")
_FROM_STATE += ("preset", "dtype", "decoder")


@dataclass(frozen=True)
class Request:
    """The options of `memflow generate`; None = not given."""

    story: Path | None = None
    output: Path | None = None
    prompts: list[str] | None = None
    seconds_per_prompt: float | None = None
    seed: int | None = None
    height: int | None = None
    width: int | None = None
    memory: str | None = None
    held: int | None = None
    top_k: int | None = None
    model: str | None = None
    preset: str | None = None
    decoder: Path | None = None
    device: str | None = None
    dtype: str | None = None
    backend: str | None = None
    prompt_cache: bool = True
    report: bool = False
    chunks: int | None = None
    save_state: Path | None = None
    resume: Path | None = None


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


def check(request: Request) -> list[Job]:
    """The videos to make. MemFlowError for what cannot work and can be seen without loading a model."""
    if request.output is None:
        raise MemFlowError("where to? -o OUT.mp4 is needed (a folder if the story file holds several stories)")
    seconds = request.seconds_per_prompt
    if seconds is not None and not (seconds > 0 and math.isfinite(seconds)):
        raise MemFlowError(f"--seconds-per-prompt must be above 0, got {seconds}")
    jobs = _resumed(request) if request.resume else _told(request)
    _check_files(request, jobs)
    return jobs


def _resumed(request: Request) -> list[Job]:
    given = [_option(name) for name in _FROM_STATE if getattr(request, name) is not None]
    if given:
        raise MemFlowError(f"--resume takes story, seed and settings from the state: leave out {', '.join(given)}")
    from memflow.stream.saved import read_header

    header = read_header(request.resume)
    missing = {"name", "model", "dtype", "video_frames", "video_checksum"} - set(header["extra"])
    if missing:
        raise MemFlowError(
            f"{request.resume}: not saved by `memflow generate` (it does not tell {', '.join(sorted(missing))})"
        )
    if header["plan"]["remaining"] == 0 and not header["plan"]["queue"]:
        raise MemFlowError(f"{request.resume}: this story has been told to its end, nothing is left to generate")
    return [Job(None, request.output, _report(request, request.output), header["extra"])]


def _told(request: Request) -> list[Job]:
    if request.story is not None and request.prompts is not None:
        raise MemFlowError("give the story either as a file or with -p, not both")
    if request.story is None and request.prompts is None:
        raise MemFlowError("which story? Give a story file, or prompts with -p")
    if request.prompts is not None:
        return [
            Job(
                Story(request.output.stem, check_prompts(request.prompts, "-p")),
                request.output,
                _report(request, request.output),
            )
        ]
    stories = read_stories(request.story)
    if len(stories) == 1:
        return [Job(stories[0], request.output, _report(request, request.output))]
    if request.output.suffix.lower() == ".mp4":
        raise MemFlowError(f"{request.story} holds {len(stories)} stories: -o must be a folder, not {request.output}")
    if request.save_state is not None:
        raise MemFlowError(f"--save-state is for one story, {request.story} holds {len(stories)}")
    try:
        request.output.mkdir(exist_ok=True)
    except OSError as error:
        raise MemFlowError(f"{request.output}: the folder cannot be made: {error.strerror}") from None
    outputs = [request.output / f"{story.name}.mp4" for story in stories]
    return [Job(story, output, _report(request, output)) for story, output in zip(stories, outputs, strict=True)]


def _check_files(request: Request, jobs: list[Job]) -> None:
    from memflow.output.video import check_output, check_writable

    written = [path for job in jobs for path in (job.output, job.report) if path] + [request.save_state]
    names = [path.resolve() for path in (request.story, *written) if path]
    for path in written:
        if path and names.count(path.resolve()) > 1:
            raise MemFlowError(f"{path}: is named twice, and one of its contents would overwrite the other")
    state = request.save_state
    if state and state.exists() and state.stat().st_size and not _is_state(state):
        raise MemFlowError(f"--save-state {state}: is there and is not the state of a stream; it would be lost")
    for job in jobs:
        check_output(job.output)
        if job.report is not None:
            check_writable(job.report)
    if request.save_state is not None:
        check_writable(request.save_state)


def _is_state(path: Path) -> bool:
    from memflow.stream.saved import read_header

    try:
        read_header(path)
    except MemFlowError:
        return False
    return True


def _report(request: Request, output: Path) -> Path | None:
    return output.with_suffix(".png") if request.report else None


def _option(name: str) -> str:
    return {"story": "STORY", "prompts": "-p"}.get(name, "--" + name.replace("_", "-"))

"""`memflow generate`: from a request to videos, with a progress bar while they are made and the numbers afterwards."""

from __future__ import annotations

import os
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

from memflow.cli import Interrupt
from memflow.cli.checks import made_folders
from memflow.cli.options import Request
from memflow.cli.story import Job, jobs, settings
from memflow.cli.terminal import Lines, bars, print_numbers, say
from memflow.errors import MemFlowError, shown
from memflow.output.video import VideoWriter, marked
from memflow.parallel import Alone, together


@dataclass
class Film:
    """A video in the making. before: frames that were in it. stop: chunks after which this run ends, None: with the
    story. length: chunks of the story. saved: chunks in the last state that was written. size: (height, width). loop,
    wall: seconds."""

    job: Job
    video: VideoWriter
    before: int
    stop: int | None
    length: int
    state: Path | None
    saved: int | None = None
    position: int = 0
    size: tuple[int, int] = (0, 0)
    loop: float = 0.0
    wall: float = 0.0

    @property
    def interrupted(self) -> bool:
        return self.position < min(self.length, self.stop or self.length)

    def kept(self) -> str:
        """What is there if nothing more comes."""
        said = [f"{self.job.output} keeps the {self.video.frames} frames made before"] if self.video.frames else []
        if self.saved is not None:
            said.append(f"{self.state} keeps the state after chunk {self.saved} of {self.length}")
        elif self.state:
            said.append(f"{self.state} was not written")
        return "; ".join(said)

    def save(self, stream, extra: dict[str, str]) -> None:
        stream.save(os.path.realpath(self.state), extra | self.video.mark)  # a link stays one
        self.saved = stream.position


def generate(request: Request) -> int:
    """Make the videos of `request`; returns the exit code, 0 or (after Ctrl-C) 130. MemFlowError says what is wrong."""
    with together(request.device) as ranks:
        todo = ranks.from_first(lambda: jobs(request))
        console = Console(stderr=True, highlight=False, markup=False, quiet=not ranks.first)
        films: list[Film] = []
        try:
            folders = [request.output] if len(todo) > 1 and ranks.first else []
            with made_folders(*folders), Interrupt(shared=ranks.size > 1) as interrupt:
                _run(request, todo, films, console, interrupt, ranks)
        except KeyboardInterrupt as stopped:
            say(console, "; ".join(["stopped at once", *filter(None, stopped.args)]))
            if ranks.size > 1:  # the others wait for this one
                raise SystemExit(130) from None
            return 130
        finally:
            if ranks.first:
                _show(films)
    return 130 if films[-1].interrupted else 0


def _run(
    request: Request, todo: list[Job], films: list[Film], console: Console, interrupt: Interrupt, ranks: Alone
) -> None:
    """Load the model and make one film after the other, up to Ctrl-C; those that are done are added to `films`."""
    with console.status("loading"):
        import torch

        from memflow.cli import loading

        pipe, device, about = loading.load(request, todo[0].state)
        with loading.backend(request.backend, device):
            if ranks.size > 1:
                pipe.enable_parallelism()
            if ranks.first:
                _prepare(pipe, [prompt for job in todo if job.story for prompt in job.story.prompts])
    model, dtype = request.model or todo[0].state.get("model", "storybook"), about["dtype"]
    with loading.backend(request.backend, device):
        for number, job in enumerate(todo, start=1):
            extra = {"name": job.name, **about}
            title = f"{number}/{len(todo)} {job.name}" if len(todo) > 1 else job.name
            film = None
            try:
                stream = _stream(pipe, job, request)
                where = f"{ranks.size} x {device.type}" if ranks.size > 1 else device
                say(console, f"{title}: {model} on {where}, {dtype}", style="dim")
                film = _film(stream, job, request, console)
                _make(film, stream, request, extra, title, console, interrupt)
                del stream  # its memory makes room for that of the next one
            except KeyboardInterrupt:
                raise KeyboardInterrupt(film.kept() if film else "") from None
            except Exception as error:
                if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
                    less = f"{'--held, ' if request.held else ''}--height and --width can be less"
                    said = f"{device} is out of memory, {less}: {error}"
                else:
                    said = str(error) if isinstance(error, MemFlowError) else ranks.why(error)
                if said is None:
                    raise
                kept = f" ({film.kept()})" if film and film.kept() else ""
                raise MemFlowError(f"{said}{kept}") from error
            films.append(film)
            if film.interrupted:
                return


def _prepare(pipe, prompts: list[str]) -> None:
    """Encode what is known to come while there is room: the encoder of a real model is larger than all the rest."""
    if pipe.prompts is not None:
        pipe.prompts.prepare(prompts)


def _stream(pipe, job: Job, request: Request):
    from memflow.cli.loading import size_and_memory

    if job.story is None:
        stream = pipe.resume(request.resume)
        if pipe.ranks.first:
            _prepare(pipe, [text for texts, _ in stream.plan.queue for text in texts])
        return stream
    return pipe.stream(job.story.prompts, **settings(job.story, request), **size_and_memory(request, pipe))


def _film(stream, job: Job, request: Request, console: Console) -> Film:
    """The film that `stream` makes: a new one, or one that goes on."""
    if not stream.ranks.first:
        video = VideoWriter(None, stream.pipeline.fps)  # the first process writes; nothing comes here
    elif job.story is not None or not job.output.exists():
        video = VideoWriter(job.output, stream.pipeline.fps)
        if job.story is None:
            rest = f"it will hold the rest alone, from chunk {stream.position + 1} on"
            say(console, f"{job.output} is not there: {rest}")
    else:
        video = VideoWriter.resume(job.output, stream.pipeline.fps, *marked(job.state))
    stop = None if request.chunks is None else stream.position + request.chunks
    return Film(job, video, video.frames, stop, len(stream), request.save_state, position=stream.position)


def _make(
    film: Film, stream, request: Request, extra: dict, title: str, console: Console, interrupt: Interrupt
) -> None:
    """Run `stream` into its video until its end, --chunks or Ctrl-C."""
    video, fps, loop_before = film.video, stream.pipeline.fps, stream.timings["loop"]
    ranks = stream.ranks
    lines = Lines() if request.live and ranks.first else None
    report = None
    if film.job.report and ranks.first:
        from memflow.output.report import MemoryReport

        report = MemoryReport.of(stream, film.job.name)
    with ExitStack() as stack:
        stack.enter_context(video)
        if report is not None:
            stack.push(lambda kind, *_: _draw(report, film.job.report, kind is not None))
        bar = stack.enter_context(bars(console))
        task = bar.add_task(shown(title), total=len(stream), completed=stream.position, unit="chunks")
        interrupt.notify = lambda: bar.console.print("stopping after this chunk; once more stops at once")
        stack.callback(setattr, interrupt, "notify", None)
        begin = time.perf_counter()
        # A chunk is written while the next one is made; left before `video` is, so that all is written by then.
        writer, writing = stack.enter_context(ThreadPoolExecutor(1)), Future()
        stack.callback(lambda: wait([writing]))
        writing.set_result(None)
        while stream.position != film.stop and not ranks.any(interrupt.requested):
            if lines is not None:
                lines.hand_over(stream, lambda said: bar.console.print(shown(said)), lambda: interrupt.requested)
            chunk = next(stream, None)
            if chunk is None:
                break
            writing.result()
            if chunk.switched:
                minutes, seconds = divmod(int(video.frames / fps), 60)
                line = Text(f"{minutes}:{seconds:02d}  {shown(' '.join(chunk.prompts[0].split()))}")
                line.truncate(bar.console.width, overflow="ellipsis")
                bar.console.print(line, style="dim")
            if ranks.first:
                writing = writer.submit(video.write, chunk.frames[0].numpy())
            snapshot = stream.snapshot() if film.job.report else None
            if report is not None:
                report.add(chunk, snapshot)
            film.size = tuple(chunk.frames.shape[2:4])
            if request.save_every and stream.position % request.save_every == 0:
                writing.result()
                film.save(stream, extra)
            rate = (video.frames - film.before) / (time.perf_counter() - begin)
            bar.update(task, total=len(stream), completed=stream.position, unit=f"chunks  {rate:.1f} frames/s")
        writing.result()
        film.length = len(stream)
        film.position, film.wall = stream.position, time.perf_counter() - begin
        film.loop = stream.timings["loop"] - loop_before
        if film.state and film.saved != stream.position:
            film.save(stream, extra)


def _draw(report, path: Path, failed: bool) -> None:
    """Also when the run ends early, if there is anything to draw; what ended it is more important then."""
    try:
        if len(report):
            report.save(path)
    except MemFlowError:
        if not failed:
            raise


def _show(films: list[Film]) -> None:
    """The numbers, on stdout."""
    for film in films:
        height, width = film.size
        count, fps = film.video.frames, float(film.video.fps)
        made = count - film.before
        lines = [
            ("video", str(film.job.output)),
            ("", f"{count} frames, {count / fps:.1f} s at {fps:g} frames/s, {width} x {height}"),
        ]
        if film.job.report:
            lines.append(("report", str(film.job.report)))
        if film.state:
            lines.append(("state", f"{film.state}, after chunk {film.position} of {film.length}"))
        if made:
            lines.append(("loop", f"{made / film.loop:.1f} frames/s in the denoising loop alone"))
            lines.append(("all", f"{made / film.wall:.1f} frames/s from text to file"))
        print_numbers(lines)
        if film.interrupted:
            print(f"stopped after chunk {film.position} of {film.length}")

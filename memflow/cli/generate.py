"""`memflow generate`: from a request to videos, with a progress bar while they are made and the numbers afterwards."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from memflow.cli.interrupt import Interrupt
from memflow.cli.request import Job, Request, check
from memflow.errors import MemFlowError
from memflow.output.video import VideoWriter


@dataclass
class Result:
    """What became of a job. frames: made in this run, of `total` in the file. loop, wall: seconds."""

    job: Job
    frames: int
    total: int
    fps: float
    size: tuple[int, int]
    loop: float
    wall: float
    position: int
    length: int
    interrupted: bool
    state: Path | None


def generate(request: Request) -> int:
    """Make the videos of `request`; returns the exit code, 0 or (after Ctrl-C) 130. MemFlowError says what is wrong."""
    jobs = check(request)
    console = Console(stderr=True, highlight=False, markup=False)
    results: list[Result] = []
    try:
        _run(request, jobs, results, console)
    except KeyboardInterrupt:
        lost = f"; {request.save_state} was not written" if request.save_state else ""
        console.print(f"stopped at once{lost}", soft_wrap=True)
        return 130
    finally:
        gc.unfreeze()
        _show(results)
    return 130 if results[-1].interrupted else 0


def _run(request: Request, jobs: list[Job], results: list[Result], console: Console) -> None:
    """Load the model and tell one story after the other, up to Ctrl-C; what is done is added to `results`."""
    with console.status("loading"), _uncollected():
        import torch

        from memflow.cli import loading
        from memflow.decoders import use_decoder

        known = jobs[0].state
        device = loading.choose_device(request.device)
        dtype = loading.choose_dtype(known.get("dtype", request.dtype), device)
        model = request.model or known.get("model", "storybook")
        preset = request.preset or known.get("preset")
        with loading.backend(request.backend, device):
            pipe = loading.load_pipeline(model, device, dtype, preset=preset, prompt_cache=request.prompt_cache)
            loading.choose_threads(pipe.transformer, device)
            decoder = request.decoder or known.get("decoder")
            if decoder:
                use_decoder(pipe, decoder)
            _prepare(pipe, [prompt for job in jobs if job.story for prompt in job.story.prompts])
    dtype_name = str(dtype).removeprefix("torch.")
    with loading.backend(request.backend, device):
        for number, job in enumerate(jobs, start=1):
            extra = {"name": job.name, "model": _lasting(model), "dtype": dtype_name}
            extra |= {"preset": preset} if preset else {}
            if decoder:
                extra["decoder"] = str(Path(decoder).absolute())
            try:
                stream = _stream(pipe, job, request)
                title = f"{number}/{len(jobs)} {job.name}" if len(jobs) > 1 else job.name
                console.print(f"{title}: {model} on {device}, {dtype_name}", style="dim", soft_wrap=True)
                results.append(_tell(stream, job, request, extra, title, console))
                del stream  # its memory makes room for that of the next one
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if isinstance(error, RuntimeError) and "alloc" not in str(error) and "memory" not in str(error):
                    raise
                raise MemFlowError(f"{device} is out of memory, --height and --width can be less: {error}") from error
            if results[-1].interrupted:
                return


@contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage collection of what is made here: a million objects that stay, and looking through them takes a second.

    Up to gc.unfreeze().
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _prepare(pipe, prompts: list[str]) -> None:
    """Encode what is known to come while there is room: the encoder of a real model is larger than all the rest."""
    if pipe.prompts is not None:
        pipe.prompts.prepare(prompts)


def _stream(pipe, job: Job, request: Request):
    from memflow.cli.loading import choose_memory

    if job.story is None:
        stream = pipe.resume(request.resume)
        _prepare(pipe, [text for texts, _ in stream.plan.queue for text in texts])
        return stream
    return pipe.stream(
        job.story.prompts,
        seconds_per_prompt=10.0 if request.seconds_per_prompt is None else request.seconds_per_prompt,
        height=request.height,
        width=request.width,
        seed=request.seed or 0,
        memory=choose_memory(request.memory, request.held, request.top_k, pipe.memory_config),
    )


def _tell(stream, job: Job, request: Request, extra: dict[str, str], title: str, console: Console) -> Result:
    """Run `stream` into its video until its end, --chunks or Ctrl-C."""
    fps = stream.pipeline.fps
    video, fresh = _open_video(job, fps)
    if job.story is None and fresh:
        note = f"{job.output} is not there: it will hold the rest alone, from chunk {stream.position + 1} on"
        console.print(note, soft_wrap=True)
    before, loop_before = video.frames, stream.timings["loop"]
    stop = len(stream) if request.chunks is None else min(len(stream), stream.position + request.chunks)
    report = _report(job, stream) if job.report else None
    with ExitStack() as stack:
        stack.enter_context(video)
        if report is not None:
            # Also when the run ends early, if there is anything to draw.
            stack.callback(lambda: report.save(job.report) if len(report) else None)
        bar = stack.enter_context(_progress(console))
        task = bar.add_task(title, total=len(stream), completed=stream.position, rate="")
        notify = lambda: bar.console.print("stopping after this chunk; Ctrl-C again to stop at once")  # noqa: E731
        interrupt = stack.enter_context(Interrupt(notify))
        begin, size = time.perf_counter(), (0, 0)
        # A chunk is written while the next one is made; left before `video` is, so that all is written by then.
        writer, writing = stack.enter_context(ThreadPoolExecutor(1)), Future()
        writing.set_result(None)
        while stream.position < stop and not interrupt.requested:
            try:
                chunk = next(stream)
            except MemFlowError as error:
                writing.result()
                kept = f" ({job.output} keeps the {video.frames} frames made before)" if video.frames else ""
                raise MemFlowError(f"{error}{kept}") from error
            writing.result()
            if chunk.switched:
                bar.console.print(_prompt_line(video.frames / fps, chunk.prompts[0], bar.console.width), style="dim")
            writing = writer.submit(video.write, chunk.frames[0].numpy())
            if report is not None:
                report.add(chunk, stream.snapshot())
            size = tuple(chunk.frames.shape[2:4])
            rate = (video.frames - before) / (time.perf_counter() - begin)
            bar.update(task, completed=stream.position, rate=f"{rate:.1f} frames/s")
        writing.result()
        wall = time.perf_counter() - begin
        if request.save_state:
            known = {"video_frames": str(video.frames), "video_checksum": str(video.checksum)}
            stream.save(request.save_state, extra | known)
    return Result(
        job=job,
        frames=video.frames - before,
        total=video.frames,
        fps=fps,
        size=size,
        loop=stream.timings["loop"] - loop_before,
        wall=wall,
        position=stream.position,
        length=len(stream),
        interrupted=interrupt.requested and stream.position < stop,
        state=request.save_state,
    )


def _open_video(job: Job, fps: float) -> tuple[VideoWriter, bool]:
    """The writer, and whether it begins a new file."""
    if job.story is not None or not job.output.exists():
        return VideoWriter(job.output, fps), True
    frames, checksum = int(job.state["video_frames"]), int(job.state["video_checksum"])
    return VideoWriter.resume(job.output, fps, frames, checksum), False


def _report(job: Job, stream):
    from memflow.output.report import MemoryReport

    config = stream.config
    attended = "all" if config.top_k is None else str(config.top_k)
    held = "" if config.held_frames is None else f", {config.held_frames} held"
    facts = [
        f"memory: {'published' if config.published_mode else config.policy}{held}",
        f"sink {config.sink_frames}, window {config.window_frames}, bank {config.bank_frames} latent frames",
        f"every head attends to {attended} of sink and bank",
        f"seed {stream.seeds[0]}",
    ]
    title = job.name.replace("-", " ").replace("_", " ")
    return MemoryReport(title, fps=stream.pipeline.fps, subtitle="   ·   ".join(facts))


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}", style="bold", markup=False),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("chunks  {task.fields[rate]}"),
        TimeRemainingColumn(compact=True),
        console=console,
        disable=not console.is_terminal,
    )


def _prompt_line(seconds: float, prompt: str, width: int) -> Text:
    line = Text(f"{_clock(seconds)}  {' '.join(prompt.split())}")
    line.truncate(width, overflow="ellipsis")
    return line


def _show(results: list[Result]) -> None:
    """The numbers, on stdout. Long paths are not wrapped, so that they can be copied."""
    console = Console(highlight=False, markup=False)
    for result in results:
        height, width = result.size
        seconds = result.total / result.fps
        lines = [
            ("video", str(result.job.output)),
            ("", f"{result.total} frames, {seconds:.1f} s at {result.fps:g} frames/s, {width} x {height}"),
        ]
        if result.job.report:
            lines.append(("report", str(result.job.report)))
        if result.state:
            lines.append(("state", f"{result.state}, after chunk {result.position} of {result.length}"))
        if result.frames:
            lines.append(("loop", f"{result.frames / result.loop:.1f} frames/s in the denoising loop alone"))
            lines.append(("all", f"{result.frames / result.wall:.1f} frames/s from text to file"))
        for label, text in lines:
            console.print(Text.assemble((f"{label:<8}", "dim"), text), soft_wrap=True)
        if result.interrupted:
            console.print(f"stopped by Ctrl-C after chunk {result.position} of {result.length}")


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _lasting(model: str) -> str:
    """`model` so that it is found again from another folder."""
    return str(Path(model).resolve()) if Path(model).is_dir() else model

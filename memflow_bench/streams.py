"""Streams, timed chunk by chunk in turns: ours and the published path, with and without memory, dense and activated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from memflow.memory import MemoryConfig
from memflow.stream.pipeline import MemFlowPipeline
from memflow_kernels import use_backend
from memflow_kernels.testing import relative_error

from .experiments import StreamExperiment
from .floor import AttentionOnly, ProjectionsOnly, reduced
from .models import Middle, config_of, in_float64, pipeline_of
from .published_path.stream import PublishedStream
from .rows import Row
from .splits import Split
from .targets import FLOORS
from .timing import in_turns
from .untrained import noise_pipeline

ALLOWED = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 5e-3}  # of the latents, after all steps and layers
CHUNKS = 8  # of the toy's story
STORY = ("a fox crosses the snow", "the fox finds a lit window")
Story = Callable[[], Tensor]


@dataclass
class Entry:
    """chunk: makes the next chunk's latents. split: what to watch for the split of a chunk, None = no split."""

    row: Row
    chunk: Story
    backend: str | None = None
    stream: object = None

    def __call__(self) -> Tensor:
        if self.backend is None:
            return self.chunk()
        with use_backend(self.backend):
            return self.chunk()


def run_stream(experiment: StreamExperiment, device: torch.device, say: Callable[[str], None] = print) -> list[Row]:
    """One row per provider, mode and memory setting. The first chunks are checked against float64, and not timed."""
    toy = experiment.case.name == "toy"
    entries = toy_entries(experiment, device) if toy else middle_entries(experiment, device)
    for entry in entries:
        row = entry.row
        say(f"  {row.provider}{', activated' if row.activated else ''}: {row.status} {row.reason}".rstrip())
    runs = {index: entry for index, entry in enumerate(entries) if entry.row.timed}
    rounds = in_turns(runs, device, budget=experiment.budget, least=experiment.least, most=60, cold=False)
    for samples in rounds:
        for index, seconds in samples.items():
            entries[index].row.seconds.append(seconds)
    for entry in runs.values():
        if not toy:
            entry.row.parts = split_of(entry, device)
    return [entry.row for entry in entries]


def judge(row: Row, actual: Tensor, expected: Tensor) -> None:
    row.error, row.allowed = relative_error(actual, expected), ALLOWED[row.dtype]
    if not row.error <= row.allowed:
        row.status = "wrong"
        row.reason = f"latents differ by {row.error:.2g} from float64, allowed {row.allowed:.2g}"


def middle_entries(experiment: StreamExperiment, device: torch.device) -> list[Entry]:
    """One chunk after the other from the middle of a story."""
    case, dtype = experiment.case, getattr(torch, experiment.dtype)
    pipeline = pipeline_of(case, dtype, device)
    exact = in_float64(pipeline)
    entries: list[Entry] = []
    for memory in (True, False) if experiment.without_memory else (True,):
        middle = Middle(case, memory)
        for activated in experiment.modes if memory else (False,):
            config = config_of(case, activated, memory)
            expected = middle.published(exact, config).chunk()
            suffix = "" if memory else ", no bank"
            for backend in experiment.backends:
                stream = middle.ours(pipeline, config)
                chunk = lambda stream=stream: next(stream).latents  # noqa: E731
                row = new_row(experiment, f"ours ({backend}){suffix}", activated, device)
                entries.append(Entry(row, chunk, backend, stream))
                judge(row, entries[-1](), expected)
            stream = middle.published(pipeline, config)
            row = new_row(experiment, f"published path{suffix}", activated, device)
            entries.append(Entry(row, stream.chunk, None, stream))
            judge(row, stream.chunk(), expected)
    del exact
    return entries


def toy_entries(experiment: StreamExperiment, device: torch.device) -> list[Entry]:
    """A whole story, a prompt switch in it, under the published memory, which both can keep; a run tells all of it."""
    pipeline = noise_pipeline().to(device)
    pipeline.set_progress_bar_config(disable=True)
    exact = in_float64(pipeline)
    seconds = CHUNKS / len(STORY) * pipeline.frames_per_chunk / pipeline.fps
    entries: list[Entry] = []
    for activated in experiment.modes:
        config = replace(MemoryConfig.published(), top_k=experiment.case.top_k if activated else None)
        expected = published_story(exact, config)()
        for backend in experiment.backends:
            told = lambda config=config: our_story(pipeline, config, seconds)  # noqa: E731
            entries.append(Entry(new_row(experiment, f"ours ({backend})", activated, device), told, backend))
        told = published_story(pipeline, config)
        entries.append(Entry(new_row(experiment, "published path", activated, device), told))
        for entry in entries[-len(experiment.backends) - 1 :]:
            entry.row.frames = CHUNKS * pipeline.frames_per_chunk
            judge(entry.row, entry(), expected)
    for name, processor in zip(FLOORS, (ProjectionsOnly, AttentionOnly), strict=True):
        bare = reduced(pipeline, processor)
        told = lambda bare=bare: our_story(bare, MemoryConfig.published(), seconds)  # noqa: E731
        row = new_row(experiment, name, False, device)
        row.status, row.frames = "floor", CHUNKS * pipeline.frames_per_chunk
        entries.append(Entry(row, told, "torch"))
    return entries


def our_story(pipeline: MemFlowPipeline, config: MemoryConfig, seconds: float) -> Tensor:
    stream = pipeline.stream(list(STORY), seconds_per_prompt=seconds, memory=config)
    return torch.cat([chunk.latents for chunk in stream], dim=2)


def published_story(pipeline: MemFlowPipeline, config: MemoryConfig) -> Story:
    size = {"height": pipeline.config.height, "width": pipeline.config.width}

    def told() -> Tensor:
        # Text and decoding are not what is compared: ours of both.
        helper = pipeline.stream(list(STORY), memory=config)
        stream = PublishedStream(pipeline, config=config, seeds=[0], **size)
        latents = []
        for number in range(CHUNKS):
            prompt, inside = divmod(number, CHUNKS // len(STORY))
            if inside == 0:
                stream.switch(*pipeline.encode((STORY[prompt],)))
            latents.append(stream.chunk())
            helper.decoder.decode(latents[-1])
        return torch.cat(latents, dim=2)

    return told


def new_row(experiment: StreamExperiment, provider: str, activated: bool, device: torch.device) -> Row:
    case = experiment.case
    frames = 4 * case.chunk  # video frames of a latent frame, with the VAE of these models
    return Row("stream", case.name, activated, experiment.dtype, device.type, provider, experiment.title, frames=frames)


def split_of(entry: Entry, device: torch.device) -> dict[str, float]:
    """Seconds of one more chunk by part."""
    split, stream = Split(device), entry.stream
    ours = entry.backend is not None
    transformer = stream.pipeline.transformer if ours else stream.transformer
    owner, name = (stream.memory, "update") if ours else (stream, "maintain")
    update = getattr(owner, name)

    def watched(*arguments):
        with split.part("memory"):
            return update(*arguments)

    setattr(owner, name, watched)
    try:
        with split.watching(transformer):
            entry()
    finally:
        delattr(owner, name)
    return split.seconds()

"""Frames per second of the whole thing: the loop (transformer and memory), and the loop with the decoder behind it.

Weights are random, sizes are real. Every way of running the loop is checked against the plain one before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from memflow.decoders import stream_decoder
from memflow.decoders.taehv import TinyVideoDecoder
from memflow.errors import MemFlowError
from memflow_kernels.testing import relative_error

from .experiments import RealtimeExperiment, Way
from .models import Middle, config_of, pipeline_of
from .rows import Row
from .timing import in_turns

WARM_CHUNKS = 3  # compiles, and captures CUDA graphs


def run_realtime(experiment: RealtimeExperiment, device: torch.device, say: Callable[[str], None] = print) -> list[Row]:
    """Per way of running the loop a row for the loop alone and one with each decoder; all in the same rounds."""
    case, dtype = experiment.case, getattr(torch, experiment.dtype)
    middle = Middle(case, memory=True)
    expected: Tensor | None = None
    rows: list[Row] = []
    runs: dict[int, Callable[[], object]] = {}
    for way in experiment.ways:
        row = Row("realtime", case.name, True, experiment.dtype, device.type, f"loop, {way.name}", experiment.title)
        row.frames = 4 * case.chunk
        rows.append(row)
        try:
            chunk, first = loop_of(experiment, way, middle, dtype, device)
        except MemFlowError as error:
            row.status, row.reason = "missing", str(error)
            continue
        expected = first if expected is None else expected
        row.error, row.allowed = relative_error(first, expected), way.allowed
        if not row.error <= row.allowed:
            row.status, row.reason = "wrong", f"latents differ by {row.error:.2g} from the plain way's"
            continue
        runs[len(rows) - 1] = chunk
        for name, decoder in decoders_of(experiment, dtype, device).items():
            whole = Row(**vars(row) | {"provider": f"end to end, {way.name}, {name}", "seconds": [], "parts": {}})
            rows.append(whole)
            runs[len(rows) - 1] = lambda chunk=chunk, decoder=decoder: decoder.decode(chunk())
            runs[len(rows) - 1]()
        say(f"  {way.name}: {row.status}")
    for samples in in_turns(runs, device, budget=experiment.budget, least=experiment.least, most=30, cold=False):
        for index, seconds in samples.items():
            rows[index].seconds.append(seconds)
    return rows


def loop_of(
    experiment: RealtimeExperiment, way: Way, middle: Middle, dtype: torch.dtype, device: torch.device
) -> tuple[Callable[[], Tensor], Tensor]:
    """What makes the next chunk's latents, warm, and the first that it made. MemFlowError where it cannot run here."""
    pipeline = pipeline_of(experiment.case, dtype, device)
    pipeline.transformer.fuse_qkv_projections()
    if way.float8:
        pipeline.use_float8()
    if way.compiled:
        pipeline.compile(graphs=way.graphs)
    stream = middle.ours(pipeline, config_of(experiment.case, activated=True))
    first = next(stream).latents
    for _ in range(WARM_CHUNKS if way.compiled else 0):
        next(stream)
    return lambda: next(stream).latents, first


def decoders_of(experiment: RealtimeExperiment, dtype: torch.dtype, device: torch.device) -> dict:
    """A stream's decoder by name: the VAE and the tiny one."""
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(0)
        models = {"VAE": AutoencoderKLWan(**experiment.vae), "tiny decoder": TinyVideoDecoder(**experiment.tiny)}
    return {name: stream_decoder(model.to(dtype).eval()) for name, model in models.items()}

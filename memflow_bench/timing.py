"""Timing: cold caches, warm-up, samples taken in turns so that a change of the machine's mood hits everyone alike."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator

import torch

Run = Callable[[], object]


class Flush:
    """Empties the caches before a sample by writing a buffer larger than the last of them."""

    def __init__(self, device: torch.device):
        size = 64 * 2**20
        if device.type == "cuda":
            size = max(256 * 2**20, 4 * torch.cuda.get_device_properties(device).L2_cache_size)
        self.buffer = torch.empty(size // 4, dtype=torch.int32, device=device)

    def __call__(self) -> None:
        self.buffer.zero_()


def sample(run: Run, device: torch.device, flush: Flush | None) -> float:
    """Seconds of one call: by events on a GPU, by the wall clock on a CPU."""
    if flush is not None:
        flush()
    if device.type != "cuda":
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def in_turns(
    runs: dict[str, Run],
    device: torch.device,
    *,
    budget: float,
    least: int = 3,
    most: int = 50,
    cold: bool = True,
) -> Iterator[dict[str, float]]:
    """Rounds of one sample of every run, A B C A B C ..., until `budget` seconds are used up.

    At least `least` rounds, at most `most`. The runs have been warmed up before: whoever checks a result has run it.
    """
    flush = Flush(device) if cold else None
    begin = time.perf_counter()
    for count in range(1, most + 1):
        yield {name: sample(run, device, flush) for name, run in runs.items()}
        used = time.perf_counter() - begin
        if count >= least and used * (count + 1) / count > budget:
            return


def captured(run: Run, device: torch.device) -> Run:
    """`run` as a CUDA graph: its replay has no launch gaps. Raises RuntimeError where it cannot be captured."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def spread(seconds: list[float]) -> dict[str, float]:
    """median, p20 and p80, by linear interpolation."""
    ordered = sorted(seconds)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

    return {"median": at(0.5), "p20": at(0.2), "p80": at(0.8)}


def ratio(ours: list[float], theirs: list[float]) -> float:
    """How many times faster: the median of theirs / ours, round by round."""
    return statistics.median(b / a for a, b in zip(ours, theirs, strict=True))

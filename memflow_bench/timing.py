"""Timing: cold caches, warm-up, samples taken in turns so that a change of the machine's speed hits everyone alike."""

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


def sample(run: Run, device: torch.device, flush: Flush | None) -> tuple[float, object]:
    """Seconds of one call, by events on a GPU, by the wall clock on a CPU; and what it returned."""
    if flush is not None:
        flush()
    if device.type != "cuda":
        begin = time.perf_counter()
        returned = run()
        return time.perf_counter() - begin, returned
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    start.record()
    returned = run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3, returned


def in_turns(
    runs: dict[str, Run],
    device: torch.device,
    *,
    budget: float,
    least: int = 3,
    most: int = 50,
    cold: bool = True,
    turn: Callable[[], None] | None = None,
    judge: Callable[[str, object], bool] | None = None,
) -> Iterator[dict[str, float]]:
    """Rounds of one sample of every run, A B C, C B A, A B C ..., until `budget` seconds are used up.

    Every other round runs backwards, so that what drifts within a round favours nobody. At least `least` rounds, at
    most `most`. The runs have been warmed up before: whoever checks a result has run it.

    turn: called before each round, to change the inputs. judge: told what each timed call returned, or the exception
    that it raised; a run that it says False to takes no further part. Without one exceptions are raised.
    """
    runs = dict(runs)
    flush = Flush(device) if cold else None
    begin = time.perf_counter()
    for count in range(1, most + 1):
        if turn is not None:
            turn()
        names = list(runs) if count % 2 else list(runs)[::-1]
        taken: dict[str, float] = {}
        for name in names:
            try:
                taken[name], returned = sample(runs[name], device, flush)
            except (Exception, SystemExit) as error:
                if judge is None:
                    raise
                returned = error
            if judge is not None and not judge(name, returned):
                del runs[name]
                taken.pop(name, None)
        if taken:
            yield {name: taken[name] for name in runs}
        used = time.perf_counter() - begin
        if not runs or (count >= least and used * (count + 1) / count > budget):
            return


def captured(run: Run, device: torch.device) -> Run:
    """`run` as a CUDA graph: its replay has no launch gaps, and returns what the captured run returned.

    Raises RuntimeError where it cannot be captured.
    """
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        returned = run()

    def replay() -> object:
        graph.replay()
        return returned

    return replay


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

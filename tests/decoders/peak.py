"""The most memory that tensors on the CPU took inside a block, above what there was before it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

from torch.profiler import ProfilerActivity, profile


def peak_bytes(run: Callable[[], object]) -> int:
    """Every allocation and release while `run` runs, added up in order; the largest sum."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    memory = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    memory.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in memory), default=0)

"""A long story costs per chunk, in time and memory, what a short one costs."""

from __future__ import annotations

import gc
import statistics
import time

import psutil
import pytest

MIB = 2**20


@pytest.mark.parametrize(
    ("chunks", "turns", "most"), [(100, 20, 4 * MIB), pytest.param(400, 60, 8 * MIB, marks=pytest.mark.slow)]
)
def test_a_long_story_stays_flat(toy, chunks, turns, most):
    stream, process, resident = story(toy, chunks + turns), psutil.Process(), []
    assert len(stream) == chunks + turns
    for _ in range(chunks // 10):
        skip(stream, 10)
        gc.collect()
        resident.append(process.memory_info().rss)
    grown = max(resident[-4:]) - max(resident[3:6])
    assert grown <= most, f"{grown / MIB:.1f} MiB more at chunk {chunks} than at chunk 60"

    short = story(toy, 20 + turns)  # in turns with the long one: a machine's speed may change by a third in a minute
    skip(short, 20)
    early, late = zip(*((seconds(short), seconds(stream)) for _ in range(turns)), strict=True)
    ratio = statistics.median(late) / statistics.median(early)
    assert ratio <= 1.25, f"a chunk takes {ratio:.2f} times as long at the end as at the start"
    assert next(stream, None) is None


def story(toy, chunks: int):
    prompts = [f"prompt number {i}" for i in range(chunks // 10)]
    return toy.stream(prompts, seconds_per_prompt=7.5, height=32, width=32)


def skip(stream, chunks: int) -> None:
    for _ in range(chunks):
        next(stream)


def seconds(stream) -> float:
    before = time.process_time()
    next(stream)
    return time.process_time() - before

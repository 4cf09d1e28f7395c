"""A story of 400 chunks costs per chunk, in time and memory, what a short one costs."""

from __future__ import annotations

import gc
import statistics
import time

import psutil

MIB = 2**20


def test_400_chunks_stay_flat(toy):
    stream, process, resident = story(toy), psutil.Process(), []
    assert len(stream) == 460
    for _ in range(40):
        skip(stream, 10)
        gc.collect()
        resident.append(process.memory_info().rss)
    grown = max(resident[-5:]) - max(resident[5:10])
    assert grown <= 8 * MIB, f"{grown / MIB:.1f} MiB more at chunk 400 than at chunk 100"

    short = story(toy)  # beside the long one, in turns: a machine's speed may change by a third within a minute
    skip(short, 20)
    early, late = zip(*((seconds(short), seconds(stream)) for _ in range(60)), strict=True)
    ratio = statistics.median(late) / statistics.median(early)
    assert ratio <= 1.25, f"a chunk takes {ratio:.2f} times as long at the end as at the start"
    assert next(stream, None) is None


def story(toy):
    prompts = [f"prompt number {i}" for i in range(46)]
    return toy.stream(prompts, seconds_per_prompt=7.5, height=32, width=32)


def skip(stream, chunks: int) -> None:
    for _ in range(chunks):
        next(stream)


def seconds(stream) -> float:
    before = time.process_time()
    next(stream)
    return time.process_time() - before

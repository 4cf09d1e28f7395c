"""A story of 400 chunks costs per chunk, in time and memory, what a short one costs."""

from __future__ import annotations

import gc
import statistics
import time

import psutil

MIB = 2**20


def test_400_chunks_stay_flat(toy):
    prompts = [f"prompt number {i}" for i in range(40)]
    stream = toy.stream(prompts, seconds_per_prompt=7.5, height=32, width=32)
    assert len(stream) == 400
    process, seconds, resident = psutil.Process(), [], []
    before = time.process_time()
    for chunk in stream:
        now = time.process_time()
        seconds.append(now - before)
        if chunk.index % 10 == 9:
            gc.collect()
            resident.append(process.memory_info().rss)
        before = time.process_time()
    early, late = statistics.median(seconds[20:70]), statistics.median(seconds[-50:])
    assert late <= 1.25 * early, f"{late:.4f} s per chunk at the end, {early:.4f} s at the start"
    grown = max(resident[-5:]) - max(resident[5:10])
    assert grown <= 8 * MIB, f"{grown / MIB:.1f} MiB more at chunk 400 than at chunk 100"

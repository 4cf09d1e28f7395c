"""Does `--against` tell the truth on this machine? This build against itself, and against itself made slower.

The same processes and blocks as `--against`: only that one side's calls are held up by 5 % in half of the comparisons.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch

from .against import measure
from .cases import Case
from .experiments import Experiment
from .providers.choice import OURS
from .sides import INSTALLED, Side

PLANTED = 0.05
CASE = Case("selftest", batch=1, heads=3, head_dim=64, grid=(6, 8), chunk=3, sink=3, bank=3, window=9, top_k=3,
            text_tokens=32, layers=1, ffn=256)  # fmt: skip
KINDS = (("attention", False), ("attention", True), ("layer", True), ("write", False))
BUDGET = 8.0  # seconds of a comparison, starts not counted
SAME_NEEDED, PLANTED_NEEDED = 0.95, 0.90  # share of the comparisons


def selftest(comparisons: int, header: str) -> int:
    """Print what was found; 0 where both shares are reached."""
    device, side = torch.device("cpu"), Side("this", INSTALLED, OURS)
    print(header, flush=True)
    same: list[bool] = []
    planted: list[bool] = []
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(comparisons):
            workload, activated = KINDS[number % len(KINDS)]
            experiment = Experiment(workload, CASE, "float32", budget=BUDGET)
            found = measure((side, side), experiment, activated, device, Path(scratch), slower=(0.0, PLANTED))
            same.append(found[0].comparison.verdict == "no difference")
            planted.append(found[1].comparison.verdict == "slower")
            texts = (f"{m.comparison} {m.comparison.verdict}" for m in found)
            title = f"{workload}{', activated' if activated else ''}"
            print(f"{number + 1:3d} {title:21s} itself {' | 5 % slower '.join(texts)}", flush=True)
    seconds = time.perf_counter() - begin
    print(f"\nthis build against itself: no difference {sum(same)} of {comparisons} times")
    print(f"against itself, {PLANTED:.0%} slower: found {sum(planted)} of {comparisons} times; {seconds:.0f} s")
    reached = sum(same) >= SAME_NEEDED * comparisons, sum(planted) >= PLANTED_NEEDED * comparisons
    return int(not all(reached))

"""Two builds, or two providers, in alternation: how many times faster, how sure that is, and a verdict.

Each side is a process of its own and both are started twice, because a process draws where its memory lies, and keeps
it. All that compiles has compiled before the first sample counts. Samples are taken in blocks A B B A or B A A B, by
lot. A launch ends when its interval is as narrow as PRECISION, never because of where it lies.
"""

from __future__ import annotations

import json
import math
import random
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

from .experiments import Experiment
from .sides import Process, Side, two_sides
from .table import duration
from .timing import spread
from .verdict import SIDES_CONFIDENCE, Comparison, compare_blocks
from .workloads import WORKLOADS

LAUNCHES = 2
LEAST, MOST = 10, 200  # blocks of a launch
PRECISION = 0.01  # half width of an interval that is narrow enough
SAMPLE = 0.02  # seconds, with changing inputs and emptying caches: short calls are timed several at a time
CALLS = 4  # at most: more of them make a sample steadier, but more samples make the result so


class Block(NamedTuple):
    """Seconds of a call: two samples of each side."""

    other: tuple[float, float]
    this: tuple[float, float]


class Measured(NamedTuple):
    launches: list[list[Block]]
    comparison: Comparison

    def seconds(self, side: str) -> list[float]:
        return [second for blocks in self.launches for block in blocks for second in getattr(block, side)]

    def cells(self) -> list[str]:
        """medians of the other and of this side, times faster with its interval, verdict."""
        medians = (duration(spread(self.seconds(side))["median"]) for side in ("other", "this"))
        verdict = self.comparison.verdict
        if verdict == "no difference":
            verdict += f" at this noise (one below {max(self.comparison.half_width, 0.005):.1%} would not be seen)"
        return [*medians, str(self.comparison), verdict]


def compare(against: str, provider: str, experiments: list, device: torch.device, *, cold: bool, output: Path | None,
            header: str) -> int:  # fmt: skip
    """Print, and write to `output`, a line per experiment and mode; 1 where a side failed.

    header: machine, software and load, in words.
    """
    kinds = [e for e in experiments if isinstance(e, Experiment)]
    if whole := [e.title for e in experiments if e not in kinds]:
        print(f"left out, as providers take no part in them: {', '.join(whole)}", flush=True)
    planned = [
        (e, activated) for e in kinds for activated in (e.modes if WORKLOADS[e.workload].takes_top_k else (False,))
    ]
    if not planned:
        raise ValueError("--against: there is nothing that two sides could be compared in")
    measured: dict[str, Measured | str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch, "tree")
        tree.mkdir()
        sides = two_sides(against, provider, tree)
        for experiment, activated in planned:
            title = f"{experiment.title}, {'activated' if activated else 'dense'}"
            print(title, flush=True)
            try:
                [measured[title]] = measure(sides, experiment, activated, device, Path(scratch), cold=cold)
            except RuntimeError as error:
                measured[title] = str(error)
            print(f"  {_line(measured[title])}", flush=True)
    lines = [
        f"| what | {sides[0].name} | {sides[1].name} | times faster ({SIDES_CONFIDENCE:.0%} interval) | verdict |",
        "|---" * 5 + "|",
    ]
    lines += [f"| {title} | {_line(found)} |" for title, found in measured.items()]
    print("\n".join(["", header, "", *lines]))
    if output:
        results = [
            {"title": title, "failed": found}
            if isinstance(found, str)
            else {"title": title, **found.comparison._asdict(), "launches": found.launches}
            for title, found in measured.items()
        ]
        content = {"against": against, "provider": provider, "header": header, "results": results}
        output.write_text(json.dumps(content, indent=1) + "\n")
    return int(any(isinstance(found, str) for found in measured.values()))


def _line(found: Measured | str) -> str:
    return f"| | | failed: {found}" if isinstance(found, str) else " | ".join(found.cells())


def measure(
    sides: tuple[Side, Side],
    experiment: Experiment,
    activated: bool,
    device: torch.device,
    scratch: Path,
    *,
    cold: bool = True,
    slower: tuple[float, ...] = (0.0,),
) -> list[Measured]:
    """The blocks of all launches, one `Measured` per entry of `slower`: what share is added to every call of this side,
    to see whether it is found.

    Raises:
        RuntimeError: A side died, failed or was wrong.
    """
    wish = {"workload": experiment.workload, "case": asdict(experiment.case), "dtype": experiment.dtype}
    wish |= {"activated": activated, "device": device.type, "threads": torch.get_num_threads(), "cold": cold}
    lots = random.Random(f"{experiment.title} {activated}")
    launches: list[list[list[Block]]] = [[] for _ in slower]
    for _ in range(LAUNCHES):
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=scratch)))
            pair = [Process(side, folder / str(number)) for number, side in enumerate(sides)]
            for process in pair:
                stack.callback(process.close)
            seconds = [
                p.ask({"prepare": wish | {"provider": side.provider}}) for p, side in zip(pair, sides, strict=True)
            ]
            calls = max(1, min(CALLS, math.ceil(SAMPLE / max(seconds))))
            for share, found in zip(slower, launches, strict=True):
                found.append(_blocks(pair, calls, share, lots, experiment.budget / LAUNCHES))
    return [Measured(found, compare_blocks(found)) for found in launches]


def _blocks(pair: list[Process], calls: int, slower: float, lots: random.Random, budget: float) -> list[Block]:
    wishes = {"sample": {"calls": calls}}, {"sample": {"calls": calls, "slower": slower}}
    for number in (0, 1, 0, 1):
        pair[number].ask(wishes[number])  # the first after a pause says nothing
    blocks: list[Block] = []
    begin = time.perf_counter()
    while len(blocks) < LEAST or time.perf_counter() - begin < budget:
        first = lots.randrange(2)
        taken: tuple[list[float], list[float]] = [], []
        for number in (first, 1 - first, 1 - first, first):
            taken[number].append(pair[number].ask(wishes[number]))
        blocks.append(Block(*map(tuple, taken)))
        narrow = len(blocks) >= LEAST and len(blocks) % 10 == 0 and compare_blocks([blocks]).half_width < PRECISION
        if len(blocks) == MOST or narrow:
            break
    return blocks

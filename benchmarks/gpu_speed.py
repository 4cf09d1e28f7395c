"""The speed table of the kernels at the published size, beside dense attention by others and the reference path.

Every result is compared with the `torch` backend first: a wrong one gets no time, and neither does one that fails or is
not installed; each is a row with its reason. Calls are captured in CUDA graphs where they can be, and timed in turns on
cold caches.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from benchmarks.gpu_calls import (
    MODEL,
    PASSES,
    Call,
    Ours,
    Size,
    attention_calls,
    tolerance,
    update_calls,
    write_calls,
)
from memflow_bench.timing import captured, in_turns, spread
from memflow_kernels.testing import relative_error

GROUPS_OF_CALLS = (attention_calls, write_calls, update_calls)


def measure(
    device: torch.device,
    size: Size,
    ours: Ours,
    budget: float = 4.0,
    seconds: float = float("inf"),
    report: Callable[[dict], None] = lambda found: None,
) -> dict:
    """rows (one dictionary per call), the ceilings of this machine, and what was wrong: ours alone, one hopes nothing.

    budget: seconds of timing per group of calls. seconds: after these no further call is begun. report: is given what
    was found so far, after every group.
    """
    end = time.monotonic() + seconds
    found = {"ceilings": measure_ceilings(device, size, budget), "rows": [], "wrong": []}
    for make in GROUPS_OF_CALLS:
        groups: dict[str, list[Call]] = {}
        for call in make(size, device, ours):
            groups.setdefault(call.group, []).append(call)
        for calls in groups.values():
            rows = timed(calls, device, size, budget, found["ceilings"], end)
            found["rows"] += rows
            own = (row for row in rows if "reason" in row and row["name"].split(",")[0] in ours)
            found["wrong"] += [f"{row['group']}, {row['name']}: {row['reason']}" for row in own]
            report(found)
    return found


def timed(
    calls: list[Call], device: torch.device, size: Size, budget: float, ceilings: dict[str, float], end: float
) -> list[dict]:
    """The rows of one group: those that give the right result with times, the others with the reason."""
    runs, reasons = {}, {}
    for call in calls:
        try:
            run = prepared(call, device, size, end)
        except NotRun as reason:
            reasons[call.name] = str(reason)
        except Exception as error:  # whatever a peer does wrong: it is a row, and the others go on
            reasons[call.name] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        else:
            runs[call.name] = run
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for turn in in_turns(runs, device, budget=budget) if runs else ():
        for name, taken in turn.items():
            samples[name].append(taken)
    rows = []
    for call in calls:
        row = {"group": call.group, "name": call.name}
        if call.name in reasons:
            rows.append(row | {"reason": reasons[call.name]})
            continue
        times = spread(samples[call.name])
        rate = call.work / times["median"] / (1e12 if call.unit == "TFLOP/s" else 1e9)
        row["milliseconds"] = {k: 1e3 * v for k, v in times.items()}
        rows.append(row | {"rate": rate, "unit": call.unit, "share_of_ceiling": rate / ceilings[call.unit]})
    return rows


class NotRun(Exception):
    """A call that was not tried, or whose result is wrong."""


def prepared(call: Call, device: torch.device, size: Size, end: float) -> Callable[[], object]:
    """The call, once it has given the right result; as a CUDA graph where it can be one."""
    if call.missing is not None:
        raise NotRun(call.missing)
    if time.monotonic() > end:
        raise NotRun("the time of this step was used up")
    run = call.make()
    error = relative_error(run(), call.expected)
    if not error <= tolerance(size.dtype):
        raise NotRun(f"relative error {error:.2g}")
    if device.type == "cuda":
        try:
            return captured(run, device)
        except RuntimeError as error:
            print(f"{call.group}, {call.name}: timed without a CUDA graph ({error})")
    return run


def measure_ceilings(device: torch.device, size: Size, budget: float) -> dict[str, float]:
    """Best matrix product and best copy of this machine, in the units of the rows; a copy counts both directions."""
    edge, length = (8192, 2**30) if device.type == "cuda" else (256, 2**22)
    a, b = (torch.randn(edge, edge, dtype=size.dtype, device=device) for _ in range(2))
    source, target = (torch.empty(length, dtype=torch.uint8, device=device) for _ in range(2))
    runs = {"TFLOP/s": lambda: a @ b, "GB/s": lambda: target.copy_(source)}
    turns = list(in_turns(runs, device, budget=budget))
    work = {"TFLOP/s": 2 * edge**3 / 1e12, "GB/s": 2 * length / 1e9}
    return {unit: work[unit] / min(turn[unit] for turn in turns) for unit in runs}


def targets(rows: list[dict], ceilings: dict[str, float]) -> dict[str, bool]:
    """Which of the promised numbers were reached."""
    named = {(row["group"], row["name"]): row for row in rows if "reason" not in row}
    ms = lambda *key: named[key]["milliseconds"]["median"] if key in named else float("inf")  # noqa: E731
    ours = named.get(("attention", "ours, top 3 of 6 + 9"))
    dense = [row for row in rows if row["group"] == "attention" and not row["name"].startswith(("ours", "reference"))]
    dense = [row for row in dense if "reason" not in row]
    fastest = min(dense, key=lambda row: row["milliseconds"]["median"], default=None)
    if ours is None or fastest is None:
        return {"the attention was measured": False}
    chunk = PASSES * MODEL.layers * (ms("attention", ours["name"]) + ms("write", "ours"))
    update = sum(ms(group, "ours") for group in ("relevance mean", "relevance token", "covering", "replacement"))
    update += PASSES * MODEL.layers * ms("selection", "ours")
    share = lambda group: named.get((group, "ours"), {}).get("share_of_ceiling", 0.0)  # noqa: E731
    return {
        f"attention over 12 frames faster than {fastest['name']}": ms("attention", ours["name"])
        < fastest["milliseconds"]["median"],
        f"attention at 0.9 of the TFLOP/s of {fastest['name']}": ours["rate"] >= 0.9 * fastest["rate"],
        "write at 80 % of the copy bandwidth": share("write") >= 0.8,
        "frame_means at 80 % of the copy bandwidth": share("frame_means") >= 0.8,
        "relevance, covering, selection, replacement within 1 % of a chunk "
        f"({update / chunk:.2%} of attention and write alone)": update <= 0.01 * chunk,
    }  # fmt: skip


def table(rows: list[dict]) -> str:
    """The rows as text."""
    lines = [f"{'':18} {'':32} {'ms':>9} {'rate':>10} {'':8} of ceiling"]
    for row in rows:
        if "reason" in row:
            lines.append(f"{row['group']:18} {row['name']:32} {row['reason']}")
            continue
        rate, median = row["rate"], row["milliseconds"]["median"]
        measured = f"{median:9.4f} {rate:10.1f} {row['unit']:8} {row['share_of_ceiling']:.0%}"
        lines.append(f"{row['group']:18} {row['name']:32} {measured}")
    return "\n".join(lines)

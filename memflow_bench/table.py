"""Rows as a Markdown table and as CSV."""

from __future__ import annotations

import csv
from pathlib import Path

from . import load
from .rows import Row
from .targets import PUBLISHED, targets
from .timing import ratio, spread
from .verdict import compare_rounds

COLUMNS = (
    "provider", "mode", "median", "p20", "p80", "graph", "TFLOP/s", "of ceiling", "GB/s", "of copy", "frames/s",
    "peak MiB", "error", "like for like", "vs dense published",
)  # fmt: skip


def markdown(facts: dict, ceilings: dict, rows: list[Row]) -> str:
    """Environment, one table per group, providers on the same keys, and what was to be reached."""
    parts = [environment_lines(facts, ceilings)]
    for group in dict.fromkeys(row.group for row in rows):
        members = [row for row in rows if row.group == group]
        parts.append(f"### {group}\n\n{group_table(members, ceilings)}")
    if same := same_keys(rows, load.warning(facts.get("other_work")) is not None):
        parts.append(same)
    lines = [f"| {t.what} | {t.value} | {t.needed} | {t.verdict} |" for t in targets(rows, ceilings)]
    if lines:
        parts.append("### To be reached\n\n| what | measured | needed | |\n|---|---|---|---|\n" + "\n".join(lines))
    return "\n\n".join(parts)


def environment_lines(facts: dict, ceilings: dict) -> str:
    machine = facts.get("gpu") or f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads"
    software = f"torch {facts['torch']}, triton {facts['triton']}, commit {facts['commit']}"
    busy = facts.get("other_work")
    others = "" if busy is None else f"; other work before the start {busy:.0%}"
    average = f"load average {facts['load_average']} before"
    if "load_average_after" in facts:
        average += f", {facts['load_average_after']} after"
    rates = "; ".join(
        f"{dtype}: product {limit['flops'] / 1e12:.3g} TFLOP/s, copy {limit['bytes'] / 1e9:.3g} GB/s"
        for dtype, limit in ceilings.items()
    )
    lines = [f"`{facts['command']}`", f"{machine}; {software}; {facts['time']}; {average}{others}."]
    if warned := load.warning(busy):
        lines.append(f"**{warned}**")
    if idle := facts.get("took_part_in_nothing"):
        lines.append(f"**Took part in nothing**, as no workload here is a method of theirs: {', '.join(idle)}.")
    if rates:
        lines.append(f"Ceilings: {rates}.")
    return "\n\n".join(lines)


def group_table(rows: list[Row], ceilings: dict) -> str:
    filled = [cells(row, rows, ceilings) for row in rows if row.timed]
    used = [name for name in COLUMNS if any(line.get(name) for line in filled)]
    lines = []
    if filled:
        lines += ["| " + " | ".join(used) + " |", "|" + "---|" * len(used)]
        lines += ["| " + " | ".join(line.get(name, "") for name in used) + " |" for line in filled]
    left_out: dict[str, list[str]] = {}
    for row in rows:
        if not row.timed:
            # What cannot run cannot run in any mode.
            name = row.provider if row.status == "missing" else label(row)
            left_out.setdefault(f"{row.status}: {row.reason}", []).append(name)
    if left_out:
        lines.append("")
        lines += [f"* {', '.join(dict.fromkeys(names))} - {reason}" for reason, names in left_out.items()]
    return "\n".join(lines)


def cells(row: Row, group: list[Row], ceilings: dict) -> dict[str, str]:
    times = spread(row.seconds)
    found = {"provider": row.provider, "mode": mode(row)} | {name: duration(s) for name, s in times.items()}
    best = times["median"]
    if row.graph_seconds:
        best = spread(row.graph_seconds)["median"]
        found["graph"] = duration(best)
    limit = ceilings.get(row.dtype)
    if row.flops:
        found["TFLOP/s"] = f"{row.flops / best / 1e12:.3g}"
        found["of ceiling"] = _share(row.flops / best / limit["flops"]) if limit else ""
    if row.nbytes:
        found["GB/s"] = f"{row.nbytes / best / 1e9:.3g}"
        found["of copy"] = _share(row.nbytes / best / limit["bytes"]) if limit else ""
    if row.frames:
        found["frames/s"] = f"{row.frames / best:.3g}"
    if row.peak_bytes is not None:
        found["peak MiB"] = f"{row.peak_bytes / 2**20:.0f}"
    if row.error is not None:
        found["error"] = f"{row.error:.1g}"
    for column, activated in (("like for like", row.activated), ("vs dense published", False)):
        against = published_of(row, group, activated)
        if against is not None and (column == "like for like" or row.activated):
            found[column] = times_faster(row, against)
    return found


def _share(share: float) -> str:
    """Of a ceiling; a share above it shows that what was measured was none, as on a busy machine."""
    return f"{share:.0%}" if share <= 1 else "none"


def times_faster(row: Row, against: Row) -> str:
    """The median of the ratios round by round; with its interval where there are rounds enough."""
    compared = compare_rounds(row.seconds, against.seconds)
    shown = f"{ratio(row.seconds, against.seconds):.2f}x"
    return shown if compared is None or row is against else f"{shown} ({compared.low:.2f} to {compared.high:.2f})"


def published_of(row: Row, group: list[Row], activated: bool) -> Row | None:
    """The published path of the same rounds, dense or activated; the one without bank for a row without one."""
    bank = row.provider.endswith("no bank")
    for other in group:
        same = other.provider.startswith(PUBLISHED) and other.provider.endswith("no bank") == bank
        if same and other.activated == activated and len(other.seconds) == len(row.seconds) > 0:
            return other
    return None


def same_keys(rows: list[Row], busy: bool) -> str:
    """Activated attention like for like: every provider attends to the same keys, the baseline is the published path
    activated. Empty where no group has both. busy: other work made the times; there is no verdict then."""
    lines = []
    for group in dict.fromkeys(row.group for row in rows):
        members = [row for row in rows if row.group == group and row.activated and row.timed]
        baseline = next((row for row in members if row.provider == PUBLISHED), None)
        if baseline is None or len(members) < 2:
            continue
        for row in members:
            if len(row.seconds) != len(baseline.seconds):
                continue
            compared = compare_rounds(row.seconds, baseline.seconds)
            verdict = "machine busy" if busy else "too few rounds" if compared is None else compared.verdict
            verdict = "" if row is baseline else verdict
            times = duration(spread(row.seconds)["median"])
            lines.append(f"| {group} | {row.provider} | {times} | {times_faster(row, baseline)} | {verdict} |")
    if not lines:
        return ""
    head = "| what | provider | median | against the published path activated | |\n|---|---|---|---|---|\n"
    return "### Activated, on the same keys\n\n" + head + "\n".join(lines)


def mode(row: Row) -> str:
    return "activated" if row.activated else "dense"


def label(row: Row) -> str:
    return row.provider + (" (activated)" if row.activated else "")


def duration(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def write_csv(path: Path, rows: list[Row], ceilings: dict) -> None:
    """One line per row, plain numbers: seconds, per second, bytes."""
    names = ("group", "workload", "case", "mode", "dtype", "device", "provider", "status", "reason", "error", "rounds")
    numbers = ("median", "p20", "p80", "graph_median", "flops_per_s", "bytes_per_s", "frames_per_s", "peak_bytes")
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow((*names, *numbers, "like_for_like", "vs_dense_published"))
        for row in rows:
            facts = (row.group, row.workload, row.case, mode(row), row.dtype, row.device, row.provider, row.status)
            line = [*facts, row.reason, row.error, len(row.seconds)]
            if row.timed:
                times = spread(row.seconds)
                graph = spread(row.graph_seconds)["median"] if row.graph_seconds else None
                best = graph or times["median"]
                rates = [amount / best if amount else None for amount in (row.flops, row.nbytes, row.frames)]
                group = [other for other in rows if other.group == row.group]
                against = (published_of(row, group, activated) for activated in (row.activated, False))
                compared = [ratio(row.seconds, other.seconds) if other else None for other in against]
                line += [*times.values(), graph, *rates, row.peak_bytes, *compared]
            writer.writerow(line)

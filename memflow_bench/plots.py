"""Plots of a result: time against a sweep, roofline, split of a chunk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .cases import Case
from .colours import PARTS, colours_of
from .rows import Result, Row
from .table import label, mode
from .timing import spread

AXES: dict[str, tuple[str, Callable[[Case], float]]] = {
    "memory": ("frames in the bank", lambda case: case.bank),
    "window": ("frames in the window", lambda case: case.window),
    "top_k": ("candidates that a head attends to", lambda case: case.top_k),
    "resolution": ("tokens per frame", lambda case: case.tokens),
    "streams": ("streams at once", lambda case: case.batch),
}


def draw(stem: Path, result: Result) -> tuple[list[Path], list[str]]:
    """Every plot that the rows allow: the files written, and sentences on those that could not be drawn."""
    import matplotlib

    matplotlib.use("Agg")
    colours = colours_of(row.provider for row in result.rows)
    notes: list[str] = []
    drawn = [sweep_plot(stem, sweep, result, colours) for sweep in AXES]
    drawn += [roofline_plot(stem, result, colours, notes), split_plot(stem, result.rows)]
    return [path for path in drawn if path is not None], notes


def sweep_plot(stem: Path, sweep: str, result: Result, colours: dict[str, str]) -> Path | None:
    """Median time of attention along a sweep, one line per provider and mode; who has no time is named below."""
    cases, rows = result.cases, [row for row in result.rows if row.workload == "attention"]
    bases = {cases[row.case].like for row in rows if cases[row.case].sweep == sweep}
    axis, position = AXES[sweep]
    lines: dict[tuple[str, str, str], dict[float, float]] = {}
    absent: dict[str, list[str]] = {}
    for row in rows:
        entry = cases[row.case]
        if not (entry.name in bases or (entry.sweep == sweep and entry.like in bases)):
            continue
        if row.status == "ok":
            times = lines.setdefault((row.provider, label(row), row.dtype), {})
            times[position(entry)] = spread(row.seconds)["median"] * 1e3
        elif row.status != "missing":
            absent.setdefault(f"{label(row)} {row.status}", []).append(row.case)
    swept = {line: times for line, times in lines.items() if len(times) > 1}
    once = sorted({provider for provider, *_ in lines} - {provider for provider, *_ in swept})
    if not swept:
        return None
    figure, plot = _figure()
    several = len({dtype for _, _, dtype in swept}) > 1
    for (provider, title, dtype), times in swept.items():
        style = "-o" if title.endswith("(activated)") else "--s"
        shown = f"{title}, {dtype}" if several else title
        plot.plot(*zip(*sorted(times.items()), strict=True), style, color=colours[provider], label=shown, markersize=5)
    plot.set_xlabel(axis)
    plot.set_ylabel("attention, ms (median)")
    plot.set_ylim(bottom=0)
    plot.set_title(f"Attention against {axis} ({', '.join(sorted(bases))})")
    plot.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    notes = [f"no time: {who} at {', '.join(where)}" for who, where in absent.items()]
    if once:
        notes.append(f"measured at one point only, not drawn: {', '.join(once)}")
    if notes:
        figure.text(0.0, -0.02, "\n".join(notes), fontsize=8, color="#a00000" if absent else "#666666", va="top")
    return _save(figure, stem, f"sweep-{sweep}")


def roofline_plot(stem: Path, result: Result, colours: dict[str, str], notes: list[str]) -> Path | None:
    """Achieved rate against operations per byte, under the ceilings that were measured; one dtype, the first.

    Where a point lies above its ceiling, that was none: nothing is drawn, and `notes` says so.
    """
    import numpy as np

    points = [r for r in result.rows if r.status == "ok" and r.workload == "attention" and r.flops and r.nbytes]
    dtype = next((row.dtype for row in points), None)
    limit = result.ceilings.get(dtype)
    if limit is None:
        return None
    points = [row for row in points if row.dtype == dtype]
    places = [(row.flops / row.nbytes, row.flops / _best(row)) for row in points]
    shares = [rate / min(limit["flops"], intensity * limit["bytes"]) for intensity, rate in places]
    if max(shares) > 1:
        highest = points[shares.index(max(shares))]
        notes.append(
            f"No roofline is drawn: {label(highest)} on {highest.case} reached {max(shares):.0%} of what was measured "
            "as the ceiling, so that this was none."
        )
        return None
    figure, plot = _figure()
    unit, name_of_unit = (1e12, "TFLOP/s") if limit["flops"] > 1e12 else (1e9, "GFLOP/s")
    middle = [intensity for intensity, _ in places]
    xs = np.geomspace(min(middle) / 100, max(middle) * 10, 200)
    plot.plot(xs, np.minimum(limit["flops"], xs * limit["bytes"]) / unit, color="black", linewidth=1.5,
              label="best product and copy of this run")  # fmt: skip
    seen: set[str] = set()
    for row, (intensity, rate) in zip(points, places, strict=True):
        name = None if label(row) in seen else label(row)
        seen.add(label(row))
        marker = "o" if row.activated else "s"
        plot.scatter(intensity, rate / unit, marker=marker, s=28, color=colours[row.provider], label=name, alpha=0.85)
    plot.set_xscale("log")
    plot.set_yscale("log")
    plot.set_xlabel("useful operations per byte")
    plot.set_ylabel(name_of_unit)
    plot.set_title(f"Roofline, attention, {dtype}")
    plot.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return _save(figure, stem, "roofline")


def _best(row: Row) -> float:
    return spread(row.graph_seconds or row.seconds)["median"]


def split_plot(stem: Path, rows: list[Row]) -> Path | None:
    """Where the time of a chunk goes, one bar per stream."""
    bars = [row for row in rows if row.status == "ok" and row.parts]
    if not bars:
        return None
    figure, plot = _figure(height=1.2 + 0.5 * len(bars))
    names = [f"{row.provider}, {mode(row)}" for row in bars]
    left = [0.0] * len(bars)
    for part, colour in PARTS.items():
        widths = [row.parts.get(part, 0.0) * 1e3 for row in bars]
        plot.barh(names, widths, left=left, color=colour, edgecolor="#666666", linewidth=0.5, label=part)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    plot.invert_yaxis()
    plot.set_xlabel("ms per chunk")
    plot.set_title(f"Split of a chunk ({bars[0].case}, {bars[0].dtype})")
    plot.legend(fontsize=8, frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.4, -0.3))
    return _save(figure, stem, "split")


def _figure(height: float = 4.2):
    from matplotlib import pyplot

    figure, plot = pyplot.subplots(figsize=(8, height))
    plot.spines[["top", "right"]].set_visible(False)
    plot.grid(axis="y", alpha=0.25)
    plot.set_axisbelow(True)
    return figure, plot


def _save(figure, stem: Path, name: str) -> Path:
    from matplotlib import pyplot

    path = stem.with_name(f"{stem.name}-{name}.png")
    figure.savefig(path, dpi=130, bbox_inches="tight")
    pyplot.close(figure)
    return path

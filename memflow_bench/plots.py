"""Plots of a result: time against a sweep, roofline, split of a chunk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .cases import Case, load_cases
from .rows import Row
from .table import label, mode
from .timing import spread

AXES: dict[str, tuple[str, Callable[[Case], float]]] = {
    "memory": ("frames in the bank", lambda case: case.bank),
    "window": ("frames in the window", lambda case: case.window),
    "top_k": ("candidates that a head attends to", lambda case: case.top_k),
    "resolution": ("tokens per frame", lambda case: case.tokens),
    "streams": ("streams at once", lambda case: case.batch),
}
PARTS = ("linear", "attention", "memory", "rest")
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#888888", "#222222")


def draw(stem: Path, rows: list[Row], ceilings: dict) -> list[Path]:
    """Every plot that the rows allow; the files written."""
    import matplotlib

    matplotlib.use("Agg")
    right = [row for row in rows if row.status == "ok"]
    drawn = [sweep_plot(stem, sweep, right) for sweep in AXES]
    drawn += [roofline_plot(stem, right, ceilings), split_plot(stem, right)]
    return [path for path in drawn if path is not None]


def sweep_plot(stem: Path, sweep: str, rows: list[Row]) -> Path | None:
    """Median time of attention along a sweep, one line per provider and mode."""
    cases = load_cases()
    bases = {cases[row.case].like for row in rows if row.workload == "attention" and cases[row.case].sweep == sweep}
    axis, position = AXES[sweep]
    lines: dict[str, dict[float, float]] = {}
    for row in rows:
        entry = cases[row.case]
        if row.workload == "attention" and (entry.name in bases or (entry.sweep == sweep and entry.like in bases)):
            times = lines.setdefault(f"{label(row)}|{row.dtype}", {})
            times[position(entry)] = spread(row.seconds)["median"] * 1e3
    lines = {name: times for name, times in lines.items() if len(times) > 1}
    if not lines:
        return None
    figure, plot = _figure()
    providers = list(dict.fromkeys(name.split(" (activated)")[0].split("|")[0] for name in lines))
    several = len({name.split("|")[1] for name in lines}) > 1
    for name, times in lines.items():
        title, dtype = name.split("|")
        colour = COLOURS[providers.index(title.split(" (activated)")[0]) % len(COLOURS)]
        style = "-o" if "(activated)" in title else "--s"
        shown = f"{title}, {dtype}" if several else title
        plot.plot(*zip(*sorted(times.items()), strict=True), style, color=colour, label=shown, markersize=5)
    plot.set_xlabel(axis)
    plot.set_ylabel("attention, ms (median)")
    plot.set_ylim(bottom=0)
    plot.set_title(f"Attention against {axis} ({', '.join(sorted(bases))})")
    plot.legend(fontsize=8, frameon=False)
    return _save(figure, stem, f"sweep-{sweep}")


def roofline_plot(stem: Path, rows: list[Row], ceilings: dict) -> Path | None:
    """Achieved rate against operations per byte, under the ceilings that were measured; one dtype, the first."""
    import numpy as np

    points = [row for row in rows if row.workload == "attention" and row.flops and row.nbytes]
    dtype = next((row.dtype for row in points), None)
    limit = ceilings.get(dtype)
    if limit is None:
        return None
    points = [row for row in points if row.dtype == dtype]
    figure, plot = _figure()
    unit, name_of_unit = (1e12, "TFLOP/s") if limit["flops"] > 1e12 else (1e9, "GFLOP/s")
    intensity = np.logspace(0, 5, 200)
    roof = np.minimum(limit["flops"], intensity * limit["bytes"]) / unit
    plot.plot(intensity, roof, color="black", linewidth=1.5, label="ceilings measured in this run")
    providers = list(dict.fromkeys(row.provider for row in points))
    seen = set()
    for row in points:
        best = spread(row.graph_seconds or row.seconds)["median"]
        marker = "o" if row.activated else "s"
        name = None if label(row) in seen else label(row)
        seen.add(label(row))
        colour = COLOURS[providers.index(row.provider) % len(COLOURS)]
        place = row.flops / row.nbytes, row.flops / best / unit
        plot.scatter(*place, marker=marker, s=28, color=colour, label=name, alpha=0.85)
    plot.set_xscale("log")
    plot.set_yscale("log")
    plot.set_xlabel("useful operations per byte")
    plot.set_ylabel(name_of_unit)
    plot.set_title(f"Roofline, attention, {dtype}")
    plot.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return _save(figure, stem, "roofline")


def split_plot(stem: Path, rows: list[Row]) -> Path | None:
    """Where the time of a chunk goes, one bar per stream."""
    bars = [row for row in rows if row.parts]
    if not bars:
        return None
    figure, plot = _figure(height=1.2 + 0.5 * len(bars))
    names = [f"{row.provider}, {mode(row)}" for row in bars]
    left = [0.0] * len(bars)
    for part, colour in zip(PARTS, COLOURS, strict=False):
        widths = [row.parts.get(part, 0.0) * 1e3 for row in bars]
        plot.barh(names, widths, left=left, color=colour, label=part)
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
    return figure, plot


def _save(figure, stem: Path, name: str) -> Path:
    from matplotlib import pyplot

    path = stem.with_name(f"{stem.name}-{name}.png")
    figure.savefig(path, dpi=130, bbox_inches="tight")
    pyplot.close(figure)
    return path

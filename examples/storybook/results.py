"""`python -m examples.storybook evaluate`: settings, lengths, seeds; JSON that grows as it goes, a table, plots."""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path

import torch

from examples.storybook.evaluate import MEASURES, SETTINGS, Setting, evaluate
from examples.storybook.retrieval import CHUNKS, Rehearsal
from examples.storybook.statistics import Share
from examples.storybook.trials import LENGTHS

_RECALL = ("colour", "shape", "landmark")
_RETRIEVAL = ("none", "fifo", "random", "published", "published, bank of 6", "diverse", "original", "archive")


def run(pipeline, path: Path, *, stories: int, seeds: int, settings: list[Setting], say=print) -> dict:
    """Evaluate and write `path` after every setting; what it holds already is kept. Returns what it then holds.

    stories: of each length, over all seeds.
    """
    results = json.loads(path.read_text()) if path.exists() else {"recall": {}, "retrieval": {}}
    results["about"] = {
        "stories": dict.fromkeys(LENGTHS, stories),
        "seeds": seeds,
        "scenes between": LENGTHS,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "command": f"python -m examples.storybook evaluate --stories {stories} --seeds {seeds}",
    }
    each = -(-stories // seeds)
    rehearsals: list[Rehearsal] = []
    for setting in settings:
        for length in LENGTHS:
            if setting.label in results["recall"].get(length, {}):
                continue
            begin = time.perf_counter()
            parts = [evaluate(pipeline, setting, length, each, seed) for seed in range(seeds)]
            results["recall"].setdefault(length, {})[setting.label] = _merge(parts)
            _write(results, path)
            say(
                f"{setting.label}, {length}: {_summary(results['recall'][length][setting.label])}, "
                f"{time.perf_counter() - begin:.0f} s"
            )
        if setting.label in _RETRIEVAL and setting.label not in results["retrieval"]:
            rehearsals = rehearsals or [Rehearsal(pipeline, each, seed) for seed in range(seeds)]
            parts = [rehearsal.read(setting) for rehearsal in rehearsals]
            results["retrieval"][setting.label] = {
                name: [_sum([part[name][chunk] for part in parts]).to_dict() for chunk in range(CHUNKS)]
                for name in parts[0]
            }
            _write(results, path)
    return results


def _in_order(rows: dict) -> dict:
    """Rows by label in the order of SETTINGS, whatever order they were measured in; labels of others last."""
    known = [setting.label for setting in SETTINGS]
    return dict(sorted(rows.items(), key=lambda row: known.index(row[0]) if row[0] in known else len(known)))


def table(results: dict) -> str:
    """The results as Markdown."""
    lines = ["# Does the memory bring back who was away?", "", f"`{results['about']['command']}`", ""]
    for length, rows in results["recall"].items():
        any_row = next(iter(rows.values()))
        lines += [
            f"## {length} stories: {results['about']['scenes between'][length]} scenes between meeting and return",
            "",
            "| memory | " + " | ".join(MEASURES) + " | seconds per story |",
            "|---|" + "---|" * (len(MEASURES) + 1),
        ]
        for label, row in _in_order(rows).items():
            cells = [_cell(row["shares"][name]) for name in MEASURES]
            lines.append(f"| {label} | {' | '.join(cells)} | {row['seconds']:.2f} |")
        lines += ["", f"Returns per cell: {any_row['shares']['colour']['count']}. 95 % intervals (Wilson).", ""]
    if results["retrieval"]:
        lines += [
            f"## Retrieval alone: random stories of {CHUNKS} chunks, as drawn",
            "",
            "| memory | character | place | both |",
            "|---|---|---|---|",
        ]
        for label, row in _in_order(results["retrieval"]).items():
            cells = [_cell(_sum([Share(c["hits"], c["count"]) for c in row[name]]).to_dict()) for name in row]
            lines.append(f"| {label} | {' | '.join(cells)} |")
        lines.append("")
    lines += ["Measures:", "", *(f"* {name}: {what}" for name, what in MEASURES.items()), ""]
    return "\n".join(lines)


def plot(results: dict, path: Path) -> None:
    """Recall per memory, a panel per length, as bars with intervals."""
    figure, axes, pyplot = _figure(len(results["recall"]), width=7)
    for axis, (length, rows) in zip(axes, results["recall"].items(), strict=True):
        rows = _in_order(rows)
        for i, name in enumerate(_RECALL):
            shares = [row["shares"][name] for row in rows.values()]
            errors = [[s["value"] - s["low"] for s in shares], [s["high"] - s["value"] for s in shares]]
            at = [k + 0.27 * (i - 1) for k in range(len(rows))]
            axis.bar(at, [s["value"] for s in shares], 0.25, yerr=errors, label=MEASURES[name], error_kw={"lw": 0.8})
        axis.axhline(1 / 8, color="grey", lw=0.8, ls="--", label="a colour by chance")
        axis.set_xticks(range(len(rows)), rows, rotation=40, ha="right")
        axis.set(
            ylim=(0, 1.05),
            title=f"{length}: {results['about']['scenes between'][length]} scenes between meetings and returns",
        )
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=len(labels), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.94))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def plot_forgetting(results: dict, path: Path) -> None:
    """Retrieval over the length of a story, one line per memory."""
    figure, axes, pyplot = _figure(2, width=5)
    for axis, name in zip(axes, ("character", "place"), strict=True):
        for label, row in _in_order(results["retrieval"]).items():
            shares = [
                _sum([Share(c["hits"], c["count"]) for c in row[name][max(0, k - 2) : k + 3]]) for k in range(CHUNKS)
            ]
            points = [(k, s.value) for k, s in enumerate(shares) if s.count >= 20]
            if points:
                axis.plot(*zip(*points, strict=True), label=label, marker=".")
        axis.set(ylim=(0, 1.03), xlabel="chunk of the story", title=f"attention sees the {name} that was away")
        axis.grid(alpha=0.3)
    axes[-1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def settings_named(names: list[str] | None) -> list[Setting]:
    """The settings with these labels; all where None. ValueError names what is unknown."""
    known = {setting.label: setting for setting in SETTINGS}
    unknown = [name for name in names or [] if name not in known]
    if unknown:
        raise ValueError(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")
    return [known[name] for name in names or known]


def _figure(panels: int, width: float):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, panels, figsize=(width * panels, 4.4), squeeze=False, sharey=True)
    return figure, axes[0], pyplot


def _merge(parts: list[dict]) -> dict:
    shares = {name: _sum([part["shares"][name] for part in parts]).to_dict() for name in MEASURES}
    mean = {name: sum(part[name] for part in parts) / len(parts) for name in ("seconds", "chance")}
    return {"shares": shares, **mean}


def _sum(shares: list[Share]) -> Share:
    total = Share(0, 0)
    for share in shares:
        total += share
    return total


def _cell(share: dict) -> str:
    return f"{share['value']:.2f} ({share['low']:.2f} to {share['high']:.2f})" if share["count"] else ""


def _summary(row: dict) -> str:
    return ", ".join(f"{name} {row['shares'][name]['value']:.2f}" for name in _RECALL)


def _write(results: dict, path: Path) -> None:
    path.write_text(json.dumps(results, indent=1))

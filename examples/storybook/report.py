"""What the commands write: tables, plots and contact sheets."""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from examples.storybook.evaluate import CHUNKS, COMPARED
from examples.storybook.recall import MEASURES, SETTINGS, Share, total
from memflow.errors import MemFlowError

_TILE, _GAP, _TEXT = 144, 6, 40  # pixels
_PICTURES = (".png", ".jpg", ".jpeg")


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
            cells = [_cell(total([Share(c["hits"], c["count"]) for c in row[name]]).to_dict()) for name in row]
            lines.append(f"| {label} | {' | '.join(cells)} |")
        lines.append("")
    lines += ["Measures:", "", *(f"* {name}: {what}" for name, what in MEASURES.items()), ""]
    return "\n".join(lines)


def plot(results: dict, path: Path) -> None:
    """Recall per memory, a panel per length, as bars with intervals."""
    figure, axes, pyplot = _figure(len(results["recall"]), width=7)
    for axis, (length, rows) in zip(axes, results["recall"].items(), strict=True):
        rows = _in_order(rows)
        for i, name in enumerate(COMPARED):
            shares = [Share(row["shares"][name]["hits"], row["shares"][name]["count"]) for row in rows.values()]
            errors = [[s.value - s.interval[0] for s in shares], [s.interval[1] - s.value for s in shares]]
            at = [k + 0.27 * (i - 1) for k in range(len(rows))]
            axis.bar(at, [s.value for s in shares], 0.25, yerr=errors, label=MEASURES[name], error_kw={"lw": 0.8})
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
                total([Share(c["hits"], c["count"]) for c in row[name][max(0, k - 2) : k + 3]]) for k in range(CHUNKS)
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


def contact_sheet(
    pipeline, prompts: list[str], path: Path, *, seconds: float, seed: int, columns: int, memory=None
) -> None:
    """Tell the story and write the sheet to `path` (.png or .jpg): first, middle and last frame per prompt.

    columns: cells in a row. memory: a `MemoryConfig`; the model's own where None.
    """
    if path.suffix.lower() not in _PICTURES:
        raise MemFlowError(f"a contact sheet is a picture, {' or '.join(_PICTURES)}; got {path.name!r}")
    path.parent.mkdir(parents=True, exist_ok=True)
    stream = pipeline.stream(prompts, seconds_per_prompt=seconds, seed=seed, memory=memory)
    parts: list[tuple[str, list[np.ndarray]]] = []
    for chunk in stream:
        if chunk.switched:
            parts.append((chunk.prompts[0], []))
        parts[-1][1].extend(chunk.frames[0].numpy())
    cells = [_sheet_cell(text, frames) for text, frames in parts]
    width, height = cells[0].size
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * (width + _GAP) - _GAP, rows * (height + _GAP) - _GAP), "white")
    for i, cell in enumerate(cells):
        sheet.paste(cell, ((i % columns) * (width + _GAP), (i // columns) * (height + _GAP)))
    sheet.save(path, optimize=True, quality=90)


def _in_order(rows: dict) -> dict:
    """Rows by label in the order of SETTINGS, whatever order they were measured in; labels of others last."""
    known = [setting.label for setting in SETTINGS]
    return dict(sorted(rows.items(), key=lambda row: known.index(row[0]) if row[0] in known else len(known)))


def _figure(panels: int, width: float):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, panels, figsize=(width * panels, 4.4), squeeze=False, sharey=True)
    return figure, axes[0], pyplot


def _cell(share: dict) -> str:
    return f"{share['value']:.2f} ({share['low']:.2f} to {share['high']:.2f})" if share["count"] else ""


def _sheet_cell(text: str, frames: list[np.ndarray]) -> Image.Image:
    chosen = [frames[0], frames[len(frames) // 2], frames[-1]]
    cell = Image.new("RGB", (len(chosen) * _TILE, _TILE + _TEXT), "white")
    for i, frame in enumerate(chosen):
        cell.paste(Image.fromarray(frame).resize((_TILE, _TILE), Image.Resampling.BOX), (i * _TILE, 0))
    font = ImageFont.load_default(14)
    lines = "\n".join(textwrap.wrap(text, 58))
    ImageDraw.Draw(cell).multiline_text((2, _TILE + 3), lines, fill=(30, 30, 40), font=font)
    return cell

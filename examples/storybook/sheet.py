"""A contact sheet: a story at a glance, a few frames per prompt with the prompt below."""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_TILE, _GAP, _TEXT = 144, 6, 40  # pixels


def contact_sheet(
    pipeline, prompts: list[str], path: Path, *, seconds: float, seed: int, columns: int, memory=None
) -> None:
    """Tell the story and write the sheet to `path` (.png or .jpg): first, middle and last frame per prompt.

    columns: cells in a row. memory: a `MemoryConfig`; the model's own where None.
    """
    stream = pipeline.stream(prompts, seconds_per_prompt=seconds, seed=seed, memory=memory)
    parts: list[tuple[str, list[np.ndarray]]] = []
    for chunk in stream:
        if chunk.switched:
            parts.append((chunk.prompts[0], []))
        parts[-1][1].extend(chunk.frames[0].numpy())
    cells = [_cell(text, frames) for text, frames in parts]
    width, height = cells[0].size
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * (width + _GAP) - _GAP, rows * (height + _GAP) - _GAP), "white")
    for i, cell in enumerate(cells):
        sheet.paste(cell, ((i % columns) * (width + _GAP), (i // columns) * (height + _GAP)))
    sheet.save(path, optimize=True, quality=90)


def _cell(text: str, frames: list[np.ndarray]) -> Image.Image:
    chosen = [frames[0], frames[len(frames) // 2], frames[-1]]
    cell = Image.new("RGB", (len(chosen) * _TILE, _TILE + _TEXT), "white")
    for i, frame in enumerate(chosen):
        cell.paste(Image.fromarray(frame).resize((_TILE, _TILE), Image.Resampling.BOX), (i * _TILE, 0))
    font = ImageFont.load_default(14)
    lines = "\n".join(textwrap.wrap(text, 58))
    ImageDraw.Draw(cell).multiline_text((2, _TILE + 3), lines, fill=(30, 30, 40), font=font)
    return cell

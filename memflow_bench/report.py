"""Result files to a folder of Markdown, CSV and plots."""

from __future__ import annotations

from pathlib import Path

from . import plots
from .rows import read
from .table import markdown, write_csv


def write_report(files: list[Path], output: Path | None = None) -> int:
    """NAME.md, NAME.csv and plots NAME-*.png per result file, in `output` or beside the file."""
    for file in files:
        result = read(file)
        folder = output or file.parent
        folder.mkdir(parents=True, exist_ok=True)
        stem = folder / file.stem
        text = markdown(result.facts, result.ceilings, result.rows)
        pictures, notes = plots.draw(stem, result)
        shown = "".join(f"\n![{picture.stem}]({picture.name})\n" for picture in pictures)
        stem.with_name(stem.name + ".md").write_text(
            f"# {file.stem}\n\n{text}\n{shown}" + "".join(f"\n{note}\n" for note in notes)
        )
        write_csv(stem.with_name(stem.name + ".csv"), result.rows, result.ceilings)
        print(f"{stem}.md, {stem}.csv" + "".join(f", {picture}" for picture in pictures))
    return 0

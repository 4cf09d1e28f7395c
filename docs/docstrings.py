"""Docstrings as the site shows them: they are plain text with `code`, not Markdown, and "Example:" is a doctest, which
Griffe calls "Examples:". Fields of a class that stand in a paragraph of their own become a list."""

from __future__ import annotations

import re

import griffe


def as_markdown(text: str) -> str:
    """`text` with what Markdown would take for markup escaped, but for `code` and doctests."""
    prose, mark, examples = text.partition("\nExample:\n")
    prose = re.sub(r"(?<=\n\n)(?=\w+: )(?:.+\n?)+", _as_fields, prose)
    parts = re.split(r"(`[^`]*`)", prose)
    parts[::2] = [part.replace("*", r"\*").replace("<", "&lt;") for part in parts[::2]]
    return "".join(parts) + (f"\nExamples:\n{examples}" if mark else "")


def _as_fields(paragraph: re.Match) -> str:
    return "Attributes:\n" + "".join(f"    {line}" for line in paragraph[0].splitlines(keepends=True))


class Plain(griffe.Extension):
    def on_object(self, *, obj, **rest) -> None:
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)

"""docs/faults.md names tests that are there."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
LINES = [line for line in (TESTS.parent / "docs" / "faults.md").read_text().splitlines() if line.startswith("|")][2:]
NAMED = re.compile(r"`(\S+\.py)::(\w+)`")


@cache
def collected(file: Path) -> set[str]:
    """The functions that pytest collects of a file."""
    parts = ast.parse(file.read_text()).body
    return {part.name for part in parts if isinstance(part, ast.FunctionDef) and part.name.startswith("test_")}


def test_there_are_enough():
    assert len(LINES) >= 150
    assert len({NAMED.search(line)[0] for line in LINES}) == len(LINES), "one line for each"


@pytest.mark.parametrize("line", LINES, ids=lambda line: NAMED.search(line)[2])
def test_a_line_names_a_test_that_is_there(line):
    _, kind, where, test, _ = (cell.strip() for cell in line.split("|"))
    file, name = NAMED.fullmatch(test).groups()
    assert where and name in collected(TESTS / file)
    assert kind or line != LINES[0]

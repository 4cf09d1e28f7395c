"""One line of a result file, and the file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from .cases import Case, load_cases

FORMAT = "memflow-benchmarks-1"
OLD_NAME, NAME = "reference path", "published path"  # of a provider: files written before say the old one


@dataclass
class Row:
    """One provider on one workload.

    status: "ok"; "floor" (a time that nothing in its place can undercut: it has no result to be right or wrong);
    "wrong" (error above `allowed`), "failed" (an exception) and "missing" (cannot run here) have a reason and no time.
    seconds: every sample, in the order in which it was taken; sample i of all rows of one `group` was taken in the same
    round. graph_seconds: the same for replays of a CUDA graph. flops, nbytes: useful ones of a call. peak_bytes: memory
    that a call took beyond its inputs. parts: split of the time, by name, in seconds.
    """

    workload: str
    case: str
    activated: bool
    dtype: str
    device: str
    provider: str
    group: str
    status: str = "ok"
    reason: str = ""
    error: float | None = None
    allowed: float | None = None
    seconds: list[float] = field(default_factory=list)
    graph_seconds: list[float] = field(default_factory=list)
    flops: int | None = None
    nbytes: int | None = None
    frames: int | None = None
    peak_bytes: int | None = None
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def timed(self) -> bool:
        return self.status in ("ok", "floor")


class Result(NamedTuple):
    """A result file. ceilings: dtype -> {"flops", "bytes"} per second. cases: those of the rows, by name."""

    facts: dict
    ceilings: dict
    rows: list[Row]
    cases: dict[str, Case]


def write(path: Path, result: Result) -> None:
    data = {
        "format": FORMAT,
        "environment": result.facts,
        "ceilings": result.ceilings,
        "cases": {name: asdict(case) for name, case in result.cases.items()},
        "rows": [asdict(row) for row in result.rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n")


def read(path: Path) -> Result:
    """Raises ValueError for another kind of file, or a damaged one. A file of before cases were kept has those of the
    package."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as a benchmark result: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f"{path} is not a benchmark result of the format {FORMAT}")
    try:
        result = _result(data)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    if lost := {row.case for row in result.rows} - set(result.cases):
        raise ValueError(f"{path} is damaged: it does not hold the case {', '.join(sorted(lost))} of its rows")
    return result


def _result(data: dict) -> Result:
    rows = [Row(**row | {"provider": row["provider"].replace(OLD_NAME, NAME)}) for row in data["rows"]]
    for row in rows:
        sum(row.seconds + row.graph_seconds)  # a TypeError where they are no numbers
    kept = data.get("cases")
    cases = {name: Case(**entry | {"grid": tuple(entry["grid"])}) for name, entry in (kept or {}).items()}
    return Result(data["environment"], data["ceilings"], rows, cases if kept is not None else load_cases())

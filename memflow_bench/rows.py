"""One line of a result file, and the file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

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


def write(path: Path, environment: dict, ceilings: dict, rows: list[Row]) -> None:
    """ceilings: dtype -> {"flops", "bytes"} per second."""
    data = {"format": FORMAT, "environment": environment, "ceilings": ceilings, "rows": [asdict(row) for row in rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n")


def read(path: Path) -> tuple[dict, dict, list[Row]]:
    """environment, ceilings, rows. Raises ValueError for another kind of file."""
    try:
        data = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as a benchmark result: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f"{path} is not a benchmark result of the format {FORMAT}")
    rows = [Row(**row | {"provider": row["provider"].replace(OLD_NAME, NAME)}) for row in data["rows"]]
    return data["environment"], data["ceilings"], rows

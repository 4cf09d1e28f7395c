"""What else the machine is doing: times taken beside other work say little about a kernel."""

from __future__ import annotations

import os
import time
from pathlib import Path

BOUND = 0.10  # share of the machine that others may use before a warning
SECONDS = 0.5  # of watching


def other_work(seconds: float = SECONDS) -> float | None:
    """Share of all cores that was busy, or held by the host of a virtual machine, while this process slept.

    None where the system does not tell.
    """
    try:
        before = _ticks()
        time.sleep(seconds)
        after = _ticks()
    except (OSError, ValueError, IndexError):
        return None
    idle, total = (b - a for a, b in zip(before, after, strict=True))
    return None if total <= 0 else max(0.0, 1 - idle / total)


def _ticks() -> tuple[int, int]:
    """(idle, all) since the machine started."""
    user, nice, system, idle, waiting, *rest = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9])
    return idle + waiting, user + nice + system + idle + waiting + sum(rest)


def warning(share: float | None) -> str | None:
    """A sentence where other work is above the bound."""
    if share is None or share <= BOUND:
        return None
    return (
        f"WARNING: other work keeps {share:.0%} of this machine's {os.cpu_count()} cores busy (bound {BOUND:.0%}). "
        "Times are too long and spread; only ratios with their intervals mean something."
    )

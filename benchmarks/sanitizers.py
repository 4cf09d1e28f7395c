"""What compute-sanitizer says, report by report, and which of it is known to be no error."""

from __future__ import annotations

import re
from typing import NamedTuple


class FalseAlarm(NamedTuple):
    """tool: "memcheck" or "racecheck"; kernel and message: patterns that both have to be found; why: for the table."""

    tool: str
    kernel: str
    message: str
    why: str


# racecheck follows loads and stores of threads and the barriers between them. It does not follow the copy engine, which
# writes tiles to shared memory and tells an mbarrier so, nor the tensor cores, which read them while the warp goes on.
# The kernels that use either are named here one by one; their results are what the step `correct` checks.
FALSE_ALARMS = (
    FalseAlarm("racecheck", r"\bforward_kernel\b", r"hazard|[Rr]ace", "reads keys and values by bulk copies"),
    FalseAlarm("racecheck", r"\bquery_kernel\b", r"hazard|[Rr]ace", "wgmma reads shared memory on its own"),
    FalseAlarm("racecheck", r"\bkey_kernel\b", r"hazard|[Rr]ace", "wgmma reads shared memory on its own"),
    FalseAlarm("racecheck", r"\bframe_lse_kernel\b", r"hazard|[Rr]ace", "wgmma reads shared memory on its own"),
    FalseAlarm(
        "racecheck", r"\bforward_sm90_kernel\b", r"hazard|[Rr]ace", "bulk copies and wgmma, in warps of their own"
    ),
    FalseAlarm("racecheck", r"\bforward_sm100_kernel\b", r"hazard|[Rr]ace", "bulk copies and tcgen05, in own warps"),
)
NO_REPORT = re.compile(r"COMPUTE-SANITIZER|SUMMARY|Target application|Error: process didn't terminate|Program hit")


def reports(lines: list[str]) -> list[str]:
    """The reports in a tool's output: a line that begins with the mark and a word, and the indented ones behind it."""
    found: list[list[str]] = []
    for line in lines:
        marked = re.match(r"=========( +)(.*)", line)
        if not marked:
            continue
        if len(marked[1]) == 1:
            found.append([marked[2]])
        elif found:
            found[-1].append(marked[2])
    return ["\n".join(parts) for parts in found if parts[0] and not NO_REPORT.search(parts[0])]


def sifted(tool: str, lines: list[str]) -> tuple[list[str], dict[str, int]]:
    """The reports that stand, and how many of the others each known reason explains."""
    standing, explained = [], {}
    for report in reports(lines):
        known = (a for a in FALSE_ALARMS if a.tool == tool)
        alarm = next((a for a in known if re.search(a.kernel, report) and re.search(a.message, report)), None)
        if alarm is None:
            standing.append(report)
        else:
            name = f"{alarm.kernel.replace(chr(92) + 'b', '')}: {alarm.why}"
            explained[name] = explained.get(name, 0) + 1
    return standing, explained

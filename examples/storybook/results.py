"""Results as they come: a JSONL file, a line per measured part, so that what was interrupted goes on where it was."""

from __future__ import annotations

import json
import math
import platform
from pathlib import Path

import torch

from examples.storybook.recall import Share


class Results:
    """A line is what was asked (`about`), what came out (a string of 0 and 1 per measure, an entry per return, in an
    order that only `about` without its rule decides, so that rules can be compared return by return) and how."""

    def __init__(self, path: Path, command: str, say=print):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.say = path, say
        self.how = {"command": command, "torch": torch.__version__, "threads": torch.get_num_threads()}
        self.how["machine"] = platform.processor() or platform.machine()
        self.lines = read(path) if path.exists() else []
        self._known = {_key(line["about"]) for line in self.lines}

    def __contains__(self, about: dict) -> bool:
        return _key(about) in self._known

    def add(self, about: dict, outcomes: dict[str, list[bool]], seconds: float) -> None:
        """Write one line."""
        found = {name: "".join("01"[bool(value)] for value in values) for name, values in outcomes.items()}
        line = {"about": about, "outcomes": found, "seconds": round(seconds, 1), "how": self.how}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.lines.append(line)
        self._known.add(_key(about))
        shares = ", ".join(f"{name} {values.count('1')}/{len(values)}" for name, values in found.items())
        self.say(f"{', '.join(str(value) for value in about.values())}: {shares} ({seconds:.0f} s)")


def read(path: Path) -> list[dict]:
    """The lines of a file; a last one that was not written to its end is left out, and made again."""
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def _key(about: dict) -> str:
    return json.dumps(about, sort_keys=True)


def share(lines: list[dict], measure: str) -> Share:
    """Of all returns in `lines`; earlier lines may lack a measure."""
    values = "".join(line["outcomes"].get(measure, "") for line in lines)
    return Share(values.count("1"), len(values))


def paired(one: list[dict], other: list[dict], measure: str) -> tuple[int, int, float] | None:
    """Returns that are right in `one` alone, in `other` alone, and how likely so uneven a division is by chance (the
    exact test of McNemar 1947), over what both were asked; None where that is nothing. Earlier lines may lack a
    measure."""
    pairs = []
    others = {_key(_without_rule(line["about"])): line["outcomes"].get(measure, "") for line in other}
    for line in one:
        here, there = line["outcomes"].get(measure), others.get(_key(_without_rule(line["about"])))
        if here and there:
            pairs += zip(here, there, strict=True)
    if not pairs:
        return None
    better, worse = pairs.count(("1", "0")), pairs.count(("0", "1"))
    uneven = better + worse
    tail = sum(math.comb(uneven, i) for i in range(min(better, worse) + 1)) / 2**uneven
    return better, worse, min(1.0, 2 * tail)


def _without_rule(about: dict) -> dict:
    return {name: value for name, value in about.items() if name not in ("rule", "held", "activated")}

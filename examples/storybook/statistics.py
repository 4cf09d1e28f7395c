"""Shares and how sure they are."""

from __future__ import annotations

import math
from typing import NamedTuple

_Z = 1.959964  # 95 %


class Share(NamedTuple):
    """`hits` of `count`, as a share with its 95 % interval (Wilson's score interval, 1927)."""

    hits: int
    count: int

    @property
    def value(self) -> float:
        return self.hits / self.count if self.count else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        if not self.count:
            return math.nan, math.nan
        n, p = self.count, self.value
        middle = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
        half = _Z / (1 + _Z**2 / n) * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n * n))
        return max(0.0, middle - half), min(1.0, middle + half)

    def __add__(self, other: tuple[int, int]) -> Share:
        return Share(self.hits + other[0], self.count + other[1])

    def to_dict(self) -> dict:
        low, high = self.interval
        return {"value": self.value, "low": low, "high": high, "hits": self.hits, "count": self.count}


def chance_of_a_hit(past: int, useful: int, shown: int) -> float:
    """Probability that `shown` of `past` frames, drawn at random, hold at least one of the `useful` ones."""
    if not past or not useful:
        return 0.0
    shown = min(shown, past)
    return 1.0 - math.comb(past - useful, shown) / math.comb(past, shown)

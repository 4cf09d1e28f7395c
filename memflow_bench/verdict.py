"""Faster, slower, or no difference that this noise lets one see: from ratios of times, block by block.

A block is a few samples of two sides taken close together, so that whatever changes slowly (clock, temperature, other
work) is in both and leaves their ratio. Blocks are resampled, not samples, and in runs of neighbours, because what
disturbs one block often disturbs the next.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.99  # one comparison in a hundred may be wrong by chance
MARGIN = 0.01  # two starts of the same program differ by as much, through where its memory happens to lie
RESAMPLED = 2000
NEIGHBOURS = 2  # blocks drawn together
FEWEST = 5  # blocks of which an interval is made


class Comparison(NamedTuple):
    """faster: how many times; low, high: its interval. verdict: "faster", "slower" or "no difference"."""

    faster: float
    low: float
    high: float
    verdict: str

    def __str__(self) -> str:
        return f"{self.faster:.3f}x ({self.low:.3f} to {self.high:.3f})"

    @property
    def half_width(self) -> float:
        """Of the interval, relative: a difference as small as this may be there and not be seen."""
        return math.log(self.high / self.low) / 2


def compare_blocks(launches: list[list[float]]) -> Comparison | None:
    """What the blocks of all launches say together; None where there are too few.

    Args:
        launches: Per start of the two sides, log(time of the other / time of this) of each block, in order.

    Launches are drawn first, then blocks of each, so that the interval covers what differs from start to start. Drawing
    from few blocks shows too little of their spread: the interval is stretched as Student's t is for so few. A
    difference is reported where the whole interval lies beyond 1 +- MARGIN.
    """
    if sum(map(len, launches)) < FEWEST or not all(launches):
        return None
    generator = np.random.default_rng(0)
    medians = np.stack([_resampled_medians(np.asarray(blocks), generator) for blocks in launches])
    launch = generator.integers(len(launches), size=(len(launches), RESAMPLED))
    drawn = medians[launch, generator.permuted(np.tile(np.arange(RESAMPLED), (len(launches), 1)), axis=1)].mean(0)
    tail = (1 - CONFIDENCE) / 2
    centre = np.mean([np.median(blocks) for blocks in launches])
    stretch = _stretch(min(map(len, launches)))
    low, high = (centre + stretch * (edge - centre) for edge in np.quantile(drawn, (tail, 1 - tail)))
    edge = math.log1p(MARGIN)
    verdict = "faster" if low > edge else "slower" if high < -edge else "no difference"
    return Comparison(math.exp(centre), math.exp(low), math.exp(high), verdict)


def compare_rounds(ours: list[float], theirs: list[float]) -> Comparison | None:
    """Of two rows of one table: a round is a block."""
    return compare_blocks([[math.log(b / a) for a, b in zip(ours, theirs, strict=True)]])


def _stretch(count: int) -> float:
    """How much wider Student's t makes an interval of `count` numbers than the normal distribution (Cornish-Fisher)."""
    z, freedom = NormalDist().inv_cdf((1 + CONFIDENCE) / 2), count - 1
    t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    return t / z * math.sqrt(count / freedom)


def _resampled_medians(blocks: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Medians [RESAMPLED] of as many blocks, drawn in circles of NEIGHBOURS."""
    count = len(blocks)
    starts = generator.integers(count, size=(RESAMPLED, -(-count // NEIGHBOURS), 1))
    places = (starts + np.arange(NEIGHBOURS)) % count
    return np.median(blocks[places.reshape(RESAMPLED, -1)[:, :count]], axis=1)

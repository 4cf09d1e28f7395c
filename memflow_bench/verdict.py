"""Faster, slower, or no difference that this noise lets one see: from times of two sides, block by block.

A block is a few samples of two sides taken close together, so that whatever changes slowly (clock, temperature, other
work) is in both. Blocks are resampled, not samples, and in runs of neighbours, because what disturbs one block often
disturbs the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.99  # of the many ratios of a table, one in a hundred may be wrong by chance
SIDES_CONFIDENCE = 0.95  # of two sides: wrong far more rarely, as the whole interval must lie beyond MARGIN
MARGIN = 0.01  # two starts of the same program differ by as much, through where its memory happens to lie
RESAMPLED = 2000
NEIGHBOURS = 2  # blocks drawn together
FEWEST = 5  # blocks of which an interval is made
KEPT = 0.75  # of the samples of a side: what other work does to a call only makes it longer


Seconds = Sequence[float]


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


def compare_blocks(launches: list[list[tuple[Seconds, Seconds]]]) -> Comparison | None:
    """What the blocks of all launches say together; None where there are too few.

    Args:
        launches: Per start of the two sides its blocks in order: seconds of the other side, and as many of this one.

    Compared are the mean logarithms of the faster three quarters of each side's samples. Pairing happens in the
    resampling alone: a ratio taken within each block would be spoiled by the one slow sample of its four.
    """
    return _compared([np.log(np.asarray(blocks)) for blocks in launches], _faster_by, SIDES_CONFIDENCE)


def compare_rounds(ours: Seconds, theirs: Seconds) -> Comparison | None:
    """Of two rows of one table, whose rounds may be minutes apart: the median of the ratios round by round."""
    ratios = [math.log(b / a) for a, b in zip(ours, theirs, strict=True)]
    return _compared([np.asarray(ratios)], lambda drawn: np.median(drawn, axis=-1), CONFIDENCE)


def _faster_by(blocks: np.ndarray) -> np.ndarray:
    """[..., blocks, 2 sides, samples] logarithms of seconds -> [...] log(other / this)."""
    sides = np.moveaxis(blocks, -2, 0)
    sides = np.sort(sides.reshape(*sides.shape[:-2], -1), axis=-1)
    other, this = sides[..., : math.ceil(KEPT * sides.shape[-1])].mean(-1)
    return other - this


def _compared(
    launches: list[np.ndarray], statistic: Callable[[np.ndarray], np.ndarray], confidence: float
) -> Comparison | None:
    """The comparison of two sides by a bootstrap of `statistic`; None where there is too little to tell.

    Launches are drawn first, then blocks of each, so that the interval covers what differs from start to start. Drawing
    from few blocks shows too little of their spread: the interval is stretched as Student's t is for so few. A
    difference is reported where the whole interval lies beyond 1 +- MARGIN.
    """
    if sum(map(len, launches)) < FEWEST or not all(map(len, launches)):
        return None
    generator = np.random.default_rng(0)
    found = np.stack([statistic(blocks[_resampled(len(blocks), generator)]) for blocks in launches])
    launch = generator.integers(len(launches), size=found.shape)
    drawn = found[launch, generator.permuted(np.tile(np.arange(RESAMPLED), (len(launches), 1)), axis=1)].mean(0)
    tail = (1 - confidence) / 2
    centre = np.mean([statistic(blocks) for blocks in launches])
    stretch = _stretch(min(map(len, launches)), confidence)
    low, high = (centre + stretch * (edge - centre) for edge in np.quantile(drawn, (tail, 1 - tail)))
    edge = math.log1p(MARGIN)
    verdict = "faster" if low > edge else "slower" if high < -edge else "no difference"
    return Comparison(math.exp(centre), math.exp(low), math.exp(high), verdict)


def _stretch(count: int, confidence: float) -> float:
    """How much wider Student's t makes an interval of `count` numbers than the normal distribution (Cornish-Fisher)."""
    z, freedom = NormalDist().inv_cdf((1 + confidence) / 2), count - 1
    t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    return t / z * math.sqrt(count / freedom)


def _resampled(count: int, generator: np.random.Generator) -> np.ndarray:
    """Places [RESAMPLED, count] of as many blocks, drawn in circles of NEIGHBOURS."""
    starts = generator.integers(count, size=(RESAMPLED, -(-count // NEIGHBOURS), 1))
    places = (starts + np.arange(NEIGHBOURS)) % count
    return places.reshape(RESAMPLED, -1)[:, :count]

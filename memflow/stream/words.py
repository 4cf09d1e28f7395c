"""Which words of the prompt called for the frames that the bank shows: from the relevance of its tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from memflow.memory.views import MemorySnapshot

MOST = 3  # words of a frame
_FRACTION = 0.5  # of what the strongest word says: below this a word did not call for the frame


def called_by(snapshot: MemorySnapshot, words: list[list[str | None]]) -> list[dict[int, list[str]]]:
    """For each batch row the words that called for the frames in its bank, by frame number, the strongest first.

    A word calls for a frame by what its tokens say of it above what they say of all held frames on average, in the
    layers that vote: all but the first, whose keys know nothing of the text yet.

    Args:
        snapshot: what the memory holds and shows.
        words: for each row, the word that each token is part of; None for tokens that are no part of one.
    """
    layers = slice(1, None) if len(snapshot.held) > 1 else slice(None)
    by_token = snapshot.token_relevance[layers]  # [layers, B, T, n]
    held, recalled = snapshot.held[layers], snapshot.recalled[layers]
    if not (held >= 0).any():
        return [{} for _ in words]
    lift = by_token - np.nanmean(by_token, axis=-1, keepdims=True)
    found = []
    for row, names in enumerate(words):
        frames = {}
        for frame in np.unique(recalled[:, row][recalled[:, row] >= 0]):
            layer, place = np.nonzero(held[:, row] == frame)
            frames[int(frame)] = _strongest(lift[layer, row, :, place].mean(0), names) if len(layer) else []
        found.append(frames)
    return found


def _strongest(lift: np.ndarray, names: list[str | None]) -> list[str]:
    """lift: [T], what each token says of a frame."""
    best: dict[str, float] = {}
    for name, value in zip(names, lift, strict=False):
        if name is not None and value > best.get(name, 0.0):
            best[name] = float(value)
    ranked = sorted(best, key=best.__getitem__, reverse=True)[:MOST]
    return [name for name in ranked if best[name] >= _FRACTION * best[ranked[0]]]

"""What every chunk of a training story sees: the same frames at the same places as a stream with memory gives it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from examples.storybook.stories import CHUNK, Story
from memflow.memory.places import Places

SINK, WINDOW = 3, 9
IN_VIEW = SINK + WINDOW - CHUNK  # of the frames that a chunk sees those of sink and window come first, so many at most
_BANKS = ((6, 0.6), (3, 0.3), (0, 0.1))  # places of the bank, and how often


class Visible(NamedTuple):
    """Past frames that each chunk attends to, besides itself.

    frames [chunks, n] int64: frame numbers, sink and window before the bank, which begins at IN_VIEW; -1 = nothing.
    places [chunks, n] int64: where they are seen.
    own [chunks, CHUNK] int64: places of the chunk's own frames.
    """

    frames: np.ndarray
    places: np.ndarray
    own: np.ndarray


def visible_frames(story: Story, random: np.random.Generator) -> Visible:
    """Sink, window and a bank of past prototypes, for every chunk of `story`.

    Most often the bank holds a frame of the chunk's character and one of its place, where there are any, in random
    slots among random others; else random frames, or none: what a policy might come up with.
    """
    bank = int(random.choice([size for size, _ in _BANKS], p=[share for _, share in _BANKS]))
    places = Places(sink=SINK, bank=bank, window=WINDOW)
    scenes = [story.scenes[i] for i in story.scene_of_chunks()]
    slots = SINK + max(size for size, _ in _BANKS) + WINDOW - CHUNK
    frames = np.full((len(scenes), slots), -1, dtype=np.int64)
    seen_at = np.zeros_like(frames)
    own = np.zeros((len(scenes), CHUNK), dtype=np.int64)
    for chunk in range(len(scenes)):
        start = chunk * CHUNK
        stop = start + CHUNK
        seen = [(f, places.of_sink(f, stop)) for f in range(min(SINK, start))]
        seen += [(f, places.of_window(f, stop)) for f in range(max(SINK, stop - WINDOW), start)]
        seen += [(-1, 0)] * (IN_VIEW - len(seen))
        recalled = _recall(chunk, scenes, bank, random)
        chosen = random.permutation(bank)[: len(recalled)]
        seen += [(c * CHUNK, places.of_bank(int(slot))) for c, slot in zip(recalled, chosen, strict=True)]
        frames[chunk, : len(seen)], seen_at[chunk, : len(seen)] = zip(*seen, strict=True)
        own[chunk] = [places.of_window(f, stop) for f in range(start, stop)]
    return Visible(frames, seen_at, own)


def _recall(chunk: int, scenes: list, bank: int, random: np.random.Generator) -> list[int]:
    """Up to `bank` earlier chunks whose first frames the bank holds while `chunk` is made."""
    past = [int(c) for c in random.permutation(np.arange(1, max(1, chunk - WINDOW // CHUNK + 1)))]
    mode = random.random()
    if not past or not bank or mode < 0.08:
        return []
    held: list[int] = []
    if mode < 0.8:
        for wanted in ("name", "place"):
            right = [c for c in past if getattr(scenes[c], wanted) == getattr(scenes[chunk], wanted)]
            held += [c for c in right[:1] if c not in held]
    count = max(len(held), int(random.integers(1, bank + 1)))
    return held + [c for c in past if c not in held][: count - len(held)]

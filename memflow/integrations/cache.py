"""A caller's key and value buffers as a pool: the frames of its cache where they are, in slots instead of in order.

The caller keeps the dictionary {"k", "v": [B, slots * N, H, D], "global_end_index", "local_end_index"}, N tokens per
frame, indices in tokens. It expects the buffers filled from left to right: the sink first and, once they are full, the
newest frames behind it in order. Here a new frame takes the slot of the oldest one instead, so that nothing is moved.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from memflow.integrations.mirror import Mirror, version
from memflow_kernels import Pool, frame_means

_KNOWN: WeakIdKeyDictionary = WeakIdKeyDictionary()  # key buffer -> FrameCache


class FrameCache:
    """Which frame each slot of one layer's cache holds.

    frames: their numbers, slot by slot; slots behind them are empty. sink: slots whose frames are never given up.
    unstored: first frame of a chunk that a denoising pass wrote and that has not been stored yet. lost: frames of the
    cache that were overwritten by it.
    """

    def __init__(self, key: Tensor, tokens: int, sink: int):
        batch, length, heads, head_dim = key.shape
        self.tokens, self.sink, self.slots = tokens, sink, length // tokens
        mean_dtype = torch.float64 if key.dtype == torch.float64 else torch.float32
        # Beside the caller's buffers, which are not kept here: the key buffer is what this object is found by.
        self.frame_mean = torch.zeros((batch, self.slots, heads, head_dim), dtype=mean_dtype, device=key.device)
        self.key_version: int | None = None
        self.frames: list[int] = []
        self.unstored: int | None = None
        self.lost = 0
        self.global_end, self.local_end = Mirror("global_end_index"), Mirror("local_end_index")
        self.expected: tuple[int, int] | None = None

    @classmethod
    def of(cls, kv_cache: dict, tokens: int, sink: int) -> FrameCache:
        """The state of a caller's cache, which may have been filled by its own code so far."""
        key = kv_cache["k"]
        cache = _KNOWN.get(key)
        if cache is None:
            cache = _KNOWN[key] = cls(key, tokens, sink)
        cache._follow(kv_cache)
        return cache

    def pool(self, kv_cache: dict) -> Pool:
        """The caller's buffers and, beside them, the mean key of every slot."""
        return Pool(kv_cache["k"], kv_cache["v"], self.frame_mean)

    def _follow(self, kv_cache: dict) -> None:
        """Take over what the caller did to its indices, a new video for example."""
        ends = self.global_end.read(kv_cache), self.local_end.read(kv_cache)
        if ends == self.expected:
            return
        for name, end in zip(("global_end_index", "local_end_index"), ends, strict=True):
            if end % self.tokens:
                raise ValueError(f"kv_cache[{name!r}] is {end}, not a whole number of frames of {self.tokens} tokens")
        stop, held = (end // self.tokens for end in ends)
        if not 0 <= held <= min(self.slots, stop):
            raise ValueError(f"kv_cache: local_end_index {ends[1]} does not fit global_end_index {ends[0]}")
        first = min(held, self.sink)
        self.frames = [*range(first), *range(stop - (held - first), stop)]
        self.unstored, self.lost, self.expected = None, 0, ends

    def place(self, start: int, count: int) -> list[int]:
        """Slots for the frames of a call from frame `start` on, -1 for those that are not kept."""
        stop = start + count
        self._forget_unstored(start)
        if start == 0:
            self.frames, self.lost = [], 0
        elif max(self.frames, default=-1) >= stop:
            raise ValueError(
                f"current_start: the call ends before frame {stop}, and the cache holds frames up to "
                f"{max(self.frames)}; a stream cannot go back"
            )
        slot_of = {frame: slot for slot, frame in enumerate(self.frames)}
        oldest = stop - (self.slots - self.sink)
        places = []
        for frame in range(start, stop):
            slot = slot_of.get(frame)
            if slot is None and (frame >= oldest or len(self.frames) < self.sink):
                slot = self._free_slot()
                self.frames[slot] = frame
            elif slot is None or slot < self.sink:
                slot = -1  # too old for the window, or a frame of the sink, which stays as it began
            places.append(slot)
        return places

    def _free_slot(self) -> int:
        if len(self.frames) < self.slots:
            self.frames.append(-1)
            return len(self.frames) - 1
        self.lost += 1
        return min(range(self.sink, self.slots), key=self.frames.__getitem__)

    def _forget_unstored(self, start: int) -> None:
        if self.unstored in (None, start):
            return
        if self.lost and start:
            raise ValueError(
                f"current_start: the chunk at frame {self.unstored} was denoised and never stored, and a call at frame "
                f"{start} follows; {self.lost} frames that it should see have been overwritten"
            )
        self.frames = [frame for frame in self.frames if frame < self.unstored]
        self.unstored = None

    def end_call(self, kv_cache: dict, start: int, stop: int, stored: bool) -> None:
        """The frames from `start` to `stop` have been written; `stored`: for good."""
        if not stored:
            self.unstored = start
            return
        self.unstored, self.lost = None, 0
        self.expected = stop * self.tokens, len(self.frames) * self.tokens
        self.global_end.write(kv_cache, self.expected[0])
        self.local_end.write(kv_cache, self.expected[1])

    def refresh_means(self, kv_cache: dict) -> None:
        """Before a write of ours: compute the sink's mean keys again if anybody else wrote into the buffer."""
        key, frames = kv_cache["k"], min(self.sink, len(self.frames))
        if self.key_version is None or self.key_version != version(key):
            self.frame_mean[:, :frames] = frame_means(key[:, : frames * self.tokens], self.tokens)

    def written(self, kv_cache: dict) -> None:
        """The last write into the buffer was ours."""
        self.key_version = version(kv_cache["k"])

    def order(self) -> list[int]:
        """Slots in the order that the caller expects. A chunk that is not stored comes first behind the sink: there
        the frames lay that it overwrote, and the caller's next pass over it gives them up in turn."""
        unstored = len(self.frames) if self.unstored is None else self.unstored
        late = self.unstored is not None and self.lost
        window = range(min(self.sink, len(self.frames)), len(self.frames))
        moved = sorted(window, key=lambda slot: (not (late and self.frames[slot] >= unstored), self.frames[slot]))
        return [*range(window.start), *moved, *range(len(self.frames), self.slots)]


def contents(kv_cache: dict) -> tuple[Tensor, Tensor]:
    """Keys and values [B, slots * N, H, D] of a patched layer's cache as its own code would hold them, made for this.

    kv_cache: the caller's dictionary. Sink first, then the window, oldest frame first; empty slots behind.
    Raises ValueError between the first denoising pass of a chunk and the pass that stores it, when frames that the
    cache still counts have been overwritten.
    """
    cache = _KNOWN.get(kv_cache["k"])
    if cache is None:
        return kv_cache["k"].clone(), kv_cache["v"].clone()
    if cache.unstored is not None and cache.lost:
        raise ValueError(
            f"contents: the chunk at frame {cache.unstored} is being denoised and has taken the place of {cache.lost} "
            "frames; ask again after the pass that stores it"
        )
    order = torch.tensor(cache.order(), device=kv_cache["k"].device)
    frames = (kv_cache[name].unflatten(1, (cache.slots, cache.tokens)) for name in ("k", "v"))
    key, value = (buffer.index_select(1, order).flatten(1, 2) for buffer in frames)
    return key, value


def put_in_order(key: Tensor, value: Tensor) -> None:
    """Move the frames of a patched layer's buffers to where its own code looks for them."""
    cache = _KNOWN.pop(key, None)
    if cache is None:  # the only calls with these buffers failed
        return
    order = cache.order()
    if order == sorted(order):
        return
    for buffer in (key, value):
        frames = buffer.unflatten(1, (cache.slots, cache.tokens))
        frames[:, cache.sink :] = frames[:, order[cache.sink :]]

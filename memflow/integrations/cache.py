"""A caller's key and value buffers as a pool: the frames of its cache where they are, in slots instead of in order.

The caller keeps the dictionary {"k", "v": [B, slots * N, H, D], "global_end_index", "local_end_index"}, N tokens per
frame, indices in tokens. It expects the buffers filled from left to right: the sink first and, once they are full, the
newest frames behind it in order. Here a new frame takes the slot of the oldest one instead, so that nothing is moved.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from memflow.integrations.caller import Beside, Mirror, version
from memflow_kernels import Pool, frame_means

_KNOWN: Beside[FrameCache] = Beside()  # by key buffer

GLOBAL, LOCAL = INDICES = ("global_end_index", "local_end_index")


class Held:
    """Which frame each slot of a cache holds, before or after a call. All layers of a model go through the same ones,
    so that what one call makes of them is found out once.

    frames: their numbers, slot by slot; slots behind them are empty.
    stop, count: the caller's two indices, in frames: behind the last that is stored, and how many are.
    unstored: first frame of a chunk that a denoising pass wrote and that has not been stored yet.
    lost: frames of the cache that were overwritten by it.
    """

    __slots__ = ("count", "frames", "lost", "stop", "unstored")

    def __init__(self, frames: tuple[int, ...], stop: int, count: int, unstored: int | None = None, lost: int = 0):
        self.frames, self.stop, self.count, self.unstored, self.lost = frames, stop, count, unstored, lost

    def is_like(self, other: Held) -> bool:
        """The same state: where a pass changes nothing, what follows it has been found out already."""
        return all(getattr(self, name) == getattr(other, name) for name in Held.__slots__)

    def order(self, sink: int, slots: int) -> list[int]:
        """Slots in the order that the caller expects. A chunk that is not stored comes first behind the sink: there
        the frames lay that it overwrote, and the caller's next pass over it gives them up in turn."""
        unstored = len(self.frames) if self.unstored is None else self.unstored
        late = self.unstored is not None and self.lost
        window = range(min(sink, len(self.frames)), len(self.frames))
        moved = sorted(window, key=lambda slot: (not (late and self.frames[slot] >= unstored), self.frames[slot]))
        return [*range(window.start), *moved, *range(len(self.frames), slots)]


@functools.lru_cache(maxsize=256)
def _held_by_indices(stop: int, held: int, sink: int) -> Held:
    """What the caller's own code holds when its indices are `stop` and `held`, in frames."""
    first = min(held, sink)
    return Held((*range(first), *range(stop - (held - first), stop)), stop, held)


class Step(NamedTuple):
    """One call. places: the slot of each of its frames, -1 for those that are not kept. slots: the same as a tensor.
    start: number of its first frame, as the kernels take it. frames: what the slots hold when it has been written.
    overwritten: (slot, frame) of the stored frames that give way to it. stored, unstored: what is held after it.
    kind: how many frames the cache held, -1 where it is full then; whether a chunk was in hand, the call is a video's
    first, brings new frames, overwrites some."""

    places: list[int]
    slots: Tensor
    start: int | Tensor
    frames: tuple[int, ...]
    overwritten: list[tuple[int, int]]
    stored: Held
    unstored: Held
    kind: tuple[int, bool, bool, bool, bool]


@functools.lru_cache(maxsize=64)  # all layers, and the passes of a chunk
def _step(
    held: Held, start: int, count: int, keeps_sink: bool, sink: int, slots: int, rolls: bool, device: torch.device
) -> Step:
    stop = start + count
    before, lost = _without_unstored(held, start)
    again = start > 0 and stop <= held.stop
    if start == 0:
        before, lost, end = (), 0, stop
    elif max(before, default=-1) >= stop:
        raise ValueError(
            f"current_start: the call ends before frame {stop}, and the cache holds frames up to {max(before)}; "
            "a stream cannot go back"
        )
    else:
        end = held.count + stop - held.stop
    frames, overwritten, places = list(before), [], []
    slot_of = {frame: slot for slot, frame in enumerate(frames) if slot >= sink}
    for frame in range(start, stop):
        place = min(end, slots) - (stop - frame)  # where the caller's code has it, or would
        if place < 0 or (place < sink and again and keeps_sink):
            slot = -1  # too old, or in the sink, which stays as it began
        elif place < min(sink, len(frames)):
            slot = place
        else:
            slot = slot_of.get(frame)
            slot = _free_slot(frames, overwritten, sink, slots, rolls) if slot is None else slot
        if slot >= 0:
            frames[slot] = frame
        places.append(slot)
    at = torch.tensor(places, dtype=torch.int32, device="cpu")
    on_host = device.type == "cpu"
    after = tuple(frames)
    stored, unstored = Held(after, stop, len(after)), Held(after, held.stop, held.count, start, lost + len(overwritten))
    return Step(
        places,
        at if on_host else at.to(device, non_blocking=True),
        start if on_host else torch.full((1,), start, device=device),
        after,
        overwritten,
        held if held.is_like(stored) else stored,
        held if held.is_like(unstored) else unstored,
        (
            -1 if len(after) == slots else len(held.frames),
            held.unstored is not None,
            start == 0,
            stop > max(held.frames, default=-1) + 1,
            bool(overwritten),
        ),
    )


def _free_slot(frames: list[int], overwritten: list[tuple[int, int]], sink: int, slots: int, rolls: bool) -> int:
    if len(frames) < slots:
        frames.append(-1)
        return len(frames) - 1
    if not rolls:
        raise ValueError(
            f"kv_cache holds {slots} frames and is full; its module keeps all frames and gives up none "
            "(local_attn_size is -1, or there is none)"
        )
    slot = min(range(sink, slots), key=frames.__getitem__)
    overwritten.append((slot, frames[slot]))
    return slot


def _without_unstored(held: Held, start: int) -> tuple[tuple[int, ...], int]:
    """(frames, lost) as a call from `start` on finds them."""
    if held.unstored in (None, start):
        return held.frames, held.lost
    if held.lost and start:
        raise ValueError(
            f"current_start: the chunk at frame {held.unstored} was denoised and never stored, and a call at frame "
            f"{start} follows; {held.lost} frames that it should see have been overwritten"
        )
    return tuple(frame for frame in held.frames if frame < held.unstored), held.lost


class FrameCache:
    """One layer's cache: what it holds, and the mean key of every slot.

    sink: slots whose frames are never given up. rolls: whether others give theirs up when all are taken.
    """

    def __init__(self, key: Tensor, tokens: int):
        batch, length, heads, head_dim = key.shape
        self.tokens, self.slots = tokens, length // tokens
        mean_dtype = torch.float64 if key.dtype == torch.float64 else torch.float32
        # Beside the caller's buffers, which are not kept here: the key buffer is what this object is found by.
        self.frame_mean = torch.zeros((batch, self.slots, heads, head_dim), dtype=mean_dtype, device=key.device)
        self.key_version: int | None = None
        self.sink, self.rolls = 0, True
        self.held = Held((), 0, 0)
        self.global_end, self.local_end = Mirror(GLOBAL), Mirror(LOCAL)
        self.expected: tuple[int, int] | None = None
        self.passed: tuple[tuple, Callable[[], Tensor | None]] | None = None  # a checked write: its kind; the values
        self.user: Callable[[], object] | None = None  # whose call was the last, weakly

    @classmethod
    def of(cls, kv_cache: dict, tokens: int, sink: int, rolls: bool, start: int) -> FrameCache:
        """The state of a caller's cache before a call from frame `start` on; its own code may have filled it so far."""
        key = kv_cache["k"]
        cache = _KNOWN.get(key)
        if cache is None or cache.tokens != tokens:  # a buffer of its size may serve a video of another
            cache = _KNOWN.set(key, cls(key, tokens))
        if sink != cache.sink:
            cache.sink, cache.expected = sink, None
        cache.rolls = rolls
        cache._follow(kv_cache, start)
        return cache

    def pool(self, kv_cache: dict) -> Pool:
        """The caller's buffers and, beside them, the mean key of every slot."""
        return Pool(kv_cache["k"], kv_cache["v"], self.frame_mean)

    def ends(self) -> tuple[int, int]:
        """The caller's indices as a call has left or found them; of a cache without any, those that it would have."""
        return self.held.stop * self.tokens, self.held.count * self.tokens

    def _follow(self, kv_cache: dict, start: int) -> None:
        """Take over what the caller did to its indices, a new video for example."""
        if GLOBAL in kv_cache:
            ends = self.global_end.read(kv_cache), self.local_end.read(kv_cache)
        else:  # it keeps all frames before the call, and what lies behind them does not count
            ends = (start * self.tokens,) * 2
        if ends == self.expected:
            return
        for name, end in zip(INDICES, ends, strict=True):
            if end % self.tokens:
                raise ValueError(f"kv_cache[{name!r}] is {end}, not a whole number of frames of {self.tokens} tokens")
        stop, held = (end // self.tokens for end in ends)
        if not 0 <= held <= min(self.slots, stop):
            raise ValueError(f"kv_cache: local_end_index {ends[1]} does not fit global_end_index {ends[0]}")
        self.held, self.expected = _held_by_indices(stop, held, self.sink), ends

    def step(self, start: int, count: int, keeps_sink: bool, device: torch.device) -> Step:
        """What a call over `count` frames from `start` on does to the slots. keeps_sink: where it encodes frames again
        that are stored, those in the place of the sink are not written."""
        return _step(self.held, start, count, keeps_sink, self.sink, self.slots, self.rolls, device)

    def end_call(self, kv_cache: dict, step: Step, stop: int, stored: bool) -> None:
        """The call has been written, up to frame `stop`; `stored`: for good."""
        if not stored:
            self.held = step.unstored
            return
        self.held = step.stored
        if self.expected == self.ends():  # what the caller's indices said when the call began
            return
        self.expected = self.ends()
        if GLOBAL in kv_cache:
            self.global_end.write(kv_cache, self.expected[0])
            self.local_end.write(kv_cache, self.expected[1])

    def touched(self, kv_cache: dict) -> bool:
        """Whether anybody else may have written into the key buffer since our last write."""
        return self.key_version is None or self.key_version != version(kv_cache["k"])

    def refresh_means(self, kv_cache: dict) -> None:
        """Before a write of ours: compute the sink's mean keys again if anybody else wrote into the buffer."""
        if self.touched(kv_cache):
            frames = min(self.sink, len(self.held.frames))
            self.frame_mean[:, :frames] = frame_means(kv_cache["k"][:, : frames * self.tokens], self.tokens)

    def written(self, kv_cache: dict) -> None:
        """The last write into the buffer was ours."""
        self.key_version = version(kv_cache["k"])

    def order(self) -> list[int]:
        """Slots in the order that the caller expects."""
        return self.held.order(self.sink, self.slots)


def contents(kv_cache: dict) -> tuple[Tensor, Tensor]:
    """Keys and values of a patched layer's cache as its own code would hold them, made for this call.

    Args:
        kv_cache: the caller's dictionary.

    Returns:
        (key, value), each [B, slots * N, H, D]: sink first, then the window, oldest frame first; empty slots behind.

    Raises:
        ValueError: between the first denoising pass of a chunk and the pass that stores it, when frames that the cache
            still counts have been overwritten.
    """
    cache = _KNOWN.get(kv_cache["k"])
    if cache is None:
        return kv_cache["k"].clone(), kv_cache["v"].clone()
    if cache.held.unstored is not None and cache.held.lost:
        raise ValueError(
            f"contents: the chunk at frame {cache.held.unstored} is being denoised and has taken the place of "
            f"{cache.held.lost} frames; ask again after the pass that stores it"
        )
    order = torch.tensor(cache.order(), device=kv_cache["k"].device)
    frames = (kv_cache[name].unflatten(1, (cache.slots, cache.tokens)) for name in ("k", "v"))
    key, value = (buffer.index_select(1, order).flatten(1, 2) for buffer in frames)
    return key, value


def put_in_order(key: Tensor, value: Tensor) -> None:
    """Move the frames of a patched layer's buffers to where its own code looks for them."""
    cache = _KNOWN.pop(key)
    if cache is None:  # the only calls with these buffers failed
        return
    order = cache.order()
    if order == sorted(order):
        return
    for buffer in (key, value):
        frames = buffer.unflatten(1, (cache.slots, cache.tokens))
        frames[:, cache.sink :] = frames[:, order[cache.sink :]]

"""A caller's side of a patched call: what its dictionaries say, without waiting for the device unless that has changed,
and the return value that the blocks around a self-attention expect."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)
CLOSE = 2**-6  # of the greatest score: a difference that 16-bit rounding may turn round
T = TypeVar("T")


class Beside(Generic[T]):
    """What is known of tensors that are somebody else's, each for as long as it lives. (torch's own dictionary of this
    kind makes an object for every look-up, which a small model's call notices.)"""

    def __init__(self):
        self.known: dict[int, tuple[weakref.ref, T]] = {}

    def get(self, x: Tensor) -> T | None:
        found = self.known.get(id(x))
        return found[1] if found is not None and found[0]() is x else None

    def set(self, x: Tensor, value: T) -> T:
        number = id(x)
        self.known[number] = weakref.ref(x, lambda _: self.known.pop(number, None)), value
        return value

    def pop(self, x: Tensor) -> T | None:
        value = self.get(x)
        if value is not None:
            del self.known[id(x)]
        return value


def version(x: Tensor) -> int | None:
    """Counts the writes to a tensor; None where nobody counts them (tensors made in inference mode)."""
    return None if x.is_inference() else x._version


class Mirror:
    """One entry of a dictionary, a whole number or a tensor that holds one, and its value on the host."""

    def __init__(self, name: str):
        self.name = name
        self.seen: Tensor | None = None
        self.count: int | None = None
        self.value = 0

    def read(self, entries: dict) -> int:
        """The number. A tensor is read again only when it was replaced or written to since."""
        entry = entries[self.name]
        if not isinstance(entry, Tensor):
            return int(entry)
        count = version(entry)
        if count is None or self.seen is not entry or self.count != count:
            if entry.numel() != 1:
                raise ValueError(f"{self.name} must hold one number for all batch rows, got {entry.tolist()}")
            self.value = int(entry)
            self.seen, self.count = entry, count
        return self.value

    def write(self, entries: dict, value: int) -> None:
        """Set the number, a tensor in place."""
        entry = entries[self.name]
        if not isinstance(entry, Tensor):
            entries[self.name] = value
            return
        if self.seen is entry and self.value == value and self.count is not None and self.count == entry._version:
            return  # as in every denoising pass but the first, and nobody has written since
        entry.fill_(value)
        self.value = value
        self.seen, self.count = entry, version(entry)


def copied(entry):
    """An entry of a caller's dictionary, which its own code may write into."""
    return entry.clone() if isinstance(entry, Tensor) else entry


class PatchedCall(NamedTuple):
    """What a patched self-attention has just done, for `patch(returns=...)`.

    output: [B, L, C]. kv_cache: the caller's dictionary. stored: whether the call counts in its indices.
    global_end, local_end: the indices in tokens as they are now.
    """

    output: Tensor
    kv_cache: dict
    stored: bool
    global_end: int
    local_end: int


Returns = Callable[[PatchedCall], object]

# A deferred update that changes nothing: it has been made. The second keeps the model from setting the indices.
DONE = {"action": "none", "is_recompute": True}


def plain(call: PatchedCall) -> Tensor:
    """The output."""
    return call.output


def with_indices(call: PatchedCall) -> tuple:
    """(output, (global end, local end, None))."""
    return call.output, (call.global_end, call.local_end, None)


def with_update(call: PatchedCall) -> tuple:
    """(output, (global end, local end, a deferred update that changes nothing))."""
    return call.output, (call.global_end, call.local_end, {**DONE})


def recognised(name: str, result: object) -> Returns:
    """What makes return values of the kind of `result`, which the self-attention `name` has returned."""
    if isinstance(result, Tensor):
        return plain
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], Tensor) and _is_info(result[1]):
        return with_indices if result[1][2] is None else with_update
    got = (
        f"({', '.join(type(part).__name__ for part in result)})" if isinstance(result, tuple) else type(result).__name__
    )
    raise ValueError(
        f"{name}.forward: returns {got}, which is not recognised: say what its block expects, for example "
        "patch(model, returns=lambda call: (call.output, None))"
    )


def _is_info(info: object) -> bool:
    if not isinstance(info, tuple) or len(info) != 3 or not all(isinstance(end, int) for end in info[:2]):
        return False
    return info[2] is None or (isinstance(info[2], dict) and "action" in info[2])

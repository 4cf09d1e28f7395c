"""What a caller's dictionary says, without waiting for the device unless it has changed."""

from __future__ import annotations

import weakref
from typing import Generic, TypeVar

from torch import Tensor

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

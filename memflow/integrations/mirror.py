"""What a caller's dictionary says, without waiting for the device unless it has changed."""

from __future__ import annotations

from torch import Tensor


def version(x: Tensor) -> int | None:
    """Counts the writes to a tensor; None where nobody counts them (tensors made in inference mode)."""
    return None if x.is_inference() else x._version


class Mirror:
    """One entry of a dictionary, a whole number or a tensor that holds one, and its value on the host."""

    def __init__(self, name: str):
        self.name = name
        self.seen: tuple[object, int | None] | None = None
        self.value = 0

    def read(self, entries: dict) -> int:
        """The number. A tensor is read again only when it was replaced or written to since."""
        entry = entries[self.name]
        if not isinstance(entry, Tensor):
            return int(entry)
        count = version(entry)
        if count is None or self.seen is None or self.seen[0] is not entry or self.seen[1] != count:
            self.value = int(entry)
            self.seen = (entry, count)
        return self.value

    def write(self, entries: dict, value: int) -> None:
        """Set the number, a tensor in place."""
        entry = entries[self.name]
        if not isinstance(entry, Tensor):
            entries[self.name] = value
            return
        entry.fill_(value)
        self.value = value
        self.seen = (entry, version(entry))

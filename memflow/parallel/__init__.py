"""One story over several processes: what they exchange (`ranks`), and how they begin and end together (`joining`)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from memflow.parallel.alone import ALONE, Alone, launched


def joined(device: str | None) -> AbstractContextManager[Alone]:
    """The processes that a launcher started this one with, until all of them are here again; `ALONE` without one.

    Args:
        device: as --device says.
    """
    if not launched():
        return nullcontext(ALONE)
    from memflow.parallel.joining import meet  # and torch with it

    return meet(device)

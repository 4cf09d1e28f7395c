"""One story over several processes: what they exchange and how they begin and end together (`ranks`), and here one
process by itself in their place. Imports no torch: every command does."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


class Alone:
    """One process. Everything that `Ranks` does is a collective: all processes call it, in the same order.

    Attributes:
        rank: number of this process.
        size: of how many.
    """

    rank, size = 0, 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.rank == 0

    def to_heads(self, *states: Tensor) -> tuple[Tensor, ...]:
        """Each [B, L / size, H, D], of my tokens, to [B, L, H / size, D], of my heads."""
        return states

    def to_tokens(self, states: Tensor) -> Tensor:
        """[B, L, H / size, D], of my heads, to [B, L / size, H, D], of my tokens."""
        return states

    def all_heads(self, states: Tensor) -> Tensor:
        """[..., H / size, D], of my heads, to [..., H, D] in every process."""
        return states

    def mine(self, states: Tensor) -> Tensor:
        """My heads [..., H / size, D] of all [..., H, D]; a view, nothing is exchanged."""
        return states

    def collect(self, states: Tensor) -> Tensor:
        """[..., H / size, D] of my heads to [..., H, D] in the host's memory of the first process, for a state; in the
        others the result is empty."""
        return states

    def mean(self, x: Tensor) -> Tensor:
        """Of all processes' x, the same bits in each."""
        return x

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""
        return flag

    def why(self, error: Exception) -> str | None:
        """What ended the others, where `error` says that they are gone; None where it says something else."""
        return None

    def from_first(self, run: Callable[[], T]) -> T:
        """What `run` returns or raises in the first process, which alone runs it; on the CPU and to be pickled."""
        return run()


ALONE = Alone()


def launched() -> bool:
    """Whether a launcher started this process with others."""
    return os.environ.get("WORLD_SIZE", "") not in ("", "0", "1")


def together(device: str | None) -> AbstractContextManager[Alone]:
    """The processes that a launcher started for --device, until all are here again; or this one by itself."""
    return import_module("memflow.parallel.ranks").meet(device) if launched() else nullcontext(ALONE)

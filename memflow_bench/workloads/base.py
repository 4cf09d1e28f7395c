"""What a workload is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from memflow_kernels.testing import budget, relative_error

from ..cases import Case


class Verdict(NamedTuple):
    """error: largest relative Frobenius error against float64. allowed: the largest that is right."""

    error: float
    allowed: float

    @property
    def right(self) -> bool:
        return self.error <= self.allowed  # False for NaN


class Workload(ABC):
    """One thing to time, on one state.

    name: of the workload, and of the providers' method that prepares it.
    flops, nbytes: useful operations and bytes of one call (None: not a matter of one of them).
    state: what the providers get. A provider's run returns what `check` looks at.
    turns: whether `turn` changes the inputs, in place, between two sets of values.
    """

    name: str
    roundings = 2  # to the dtype on the way, the result's own included
    takes_top_k = True
    warm_first = False  # a run before the one whose memory counts: the first one of a process has scratch to make

    def __init__(self, case: Case, activated: bool, dtype: torch.dtype, device: torch.device, seed: int = 0):
        self.case, self.activated, self.dtype, self.device = case, activated, dtype, device
        self.size = dtype.itemsize
        self.state = self.make_state(seed)
        self.expected = [x.to(device) for x in self.expect()]
        self._spare = [x.clone() for x in self.changing(self.make_state(seed + 1))]
        self._spare_expected: list[Tensor] | None = None

    @property
    def turns(self) -> bool:
        return bool(self._spare)

    def turn(self) -> None:
        """Other values in the same tensors: who returns what it computed before, or knows a tensor by its address, is
        wrong from now on. Where calls change the state themselves, nothing turns."""
        if not self.turns:
            return
        for held, spare in zip(self.changing(self.state), self._spare, strict=True):
            values = held.clone()
            held.copy_(spare)
            spare.copy_(values)
        if self._spare_expected is None:
            self._spare_expected = [x.to(self.device) for x in self.expect()]
        self.expected, self._spare_expected = self._spare_expected, self.expected

    def changing(self, state: object) -> list[Tensor]:
        """The tensors of a state that a stream has anew in every call."""
        return []

    @contextmanager
    def inputs_kept(self) -> Iterator[None]:
        """For a first call: ValueError where it wrote into the inputs, which all others share; they are put back."""
        inputs = self.changing(self.state)
        kept = [x.clone() for x in inputs]
        try:
            yield
        finally:
            written = [not torch.equal(x, before) for x, before in zip(inputs, kept, strict=True)]
            for x, before in zip(inputs, kept, strict=True):
                x.copy_(before)
        if any(written):
            raise ValueError(f"wrote into {sum(written)} of its {len(inputs)} inputs, which the next call needs")

    @abstractmethod
    def make_state(self, seed: int):
        """What the providers get."""

    @abstractmethod
    def expect(self) -> list[Tensor]:
        """The right results in float64, in the form that `results` gives."""

    def results(self, returned: object) -> list[Tensor]:
        """What to compare, out of what a run returned."""
        return [returned]

    def flops(self) -> int | None:
        return None

    def nbytes(self) -> int | None:
        return None

    def check(self, returned: object) -> Verdict:
        errors = []
        results = self.results(returned)
        if len(results) != len(self.expected):
            raise ValueError(f"returned {len(results)} tensors, needed {len(self.expected)}")
        for actual, expected in zip(results, self.expected, strict=True):
            if tensor(actual).shape != expected.shape:
                raise ValueError(f"returned shape {list(actual.shape)}, needed {list(expected.shape)}")
            errors.append(relative_error(actual, expected))
        worst = next((error for error in errors if error != error), max(errors))  # NaN first
        return Verdict(worst, budget(self.dtype, self.roundings))


def tensor(returned: object) -> Tensor:
    """What was returned, if it is one."""
    if not isinstance(returned, Tensor):
        raise TypeError(f"returned {type(returned).__name__}, needed a tensor")
    return returned

"""The processes that make one story together, and what they exchange.

Outside self-attention each has some tokens of a call with all heads, inside it and in the pool all tokens with some
heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from memflow.errors import MemFlowError
from memflow.parallel import Alone, T


class Ranks(Alone):
    """All processes of torch.distributed's default group, which has been initialised: gloo for tensors on the CPU, and
    NCCL for those on GPUs."""

    def __init__(self):
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def to_heads(self, *states: Tensor) -> tuple[Tensor, ...]:
        together = torch.stack(states).unflatten(3, (self.size, -1)).movedim(3, 0)  # [whose heads, n, B, l, h, D]
        return _exchanged(together).movedim(0, 2).flatten(2, 3).unbind(0)

    def to_tokens(self, states: Tensor) -> Tensor:
        by_tokens = states.unflatten(1, (self.size, -1)).movedim(1, 0)  # [whose tokens, B, l, h, D]
        return _exchanged(by_tokens).movedim(0, 2).flatten(2, 3)

    def all_heads(self, states: Tensor) -> Tensor:
        return self._gathered(states).movedim(0, -3).flatten(-3, -2)

    def mine(self, states: Tensor) -> Tensor:
        heads = states.shape[-2] // self.size
        return states.narrow(-2, self.rank * heads, heads)

    def collect(self, states: Tensor) -> Tensor:
        *leading, heads, width = states.shape
        whole = torch.empty((*leading, self.size * heads, width) if self.first else (0,), dtype=states.dtype)
        for index, part in enumerate(states if states.numel() else ()):  # layer by layer: a GPU has no room for all
            part = part.contiguous()
            parts = [torch.empty_like(part) for _ in range(self.size)] if self.first else None
            dist.gather(part, parts)
            if self.first:
                torch.cat([part.cpu() for part in parts], -2, out=whole[index])
        return whole

    def mean(self, x: Tensor) -> Tensor:
        return self._gathered(x).mean(0)

    def any(self, flag: bool) -> bool:
        said = torch.tensor([flag], dtype=torch.uint8)
        dist.all_reduce(said, dist.ReduceOp.MAX)
        return bool(said)

    def from_first(self, run: Callable[[], T]) -> T:
        found = [None, None]
        if self.first:
            try:
                found[0] = run()
            except Exception as error:
                found[1] = error
        dist.broadcast_object_list(found, device=torch.device("cpu"))
        if found[1] is not None:
            raise found[1]
        return found[0]

    def _gathered(self, x: Tensor) -> Tensor:
        """[size, ...]: all processes' x."""
        parts = x.new_empty((self.size, *x.shape))
        if x.numel():
            dist.all_gather(list(parts.unbind()), x.contiguous())
        return parts


def _exchanged(parts: Tensor) -> Tensor:
    """parts [size, ...], one for each process -> what each of them had for this one, in their order."""
    parts = parts.contiguous()
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts)
    return received


def numbers_that_do(heads: int, calls: Iterable[int]) -> list[int]:
    """How many processes can make a story together.

    Args:
        heads: of a layer.
        calls: tokens of each kind of call.

    Returns:
        All numbers that divide both, 1 first.
    """
    calls = list(calls)
    return [n for n in range(1, heads + 1) if heads % n == 0 and all(tokens % n == 0 for tokens in calls)]


def require_division(size: int, heads: int, calls: Iterable[int] = ()) -> None:
    """MemFlowError, with the numbers that would do, where `size` processes cannot share a model's heads or tokens.

    Args:
        size: processes.
        heads: of a layer.
        calls: tokens of each kind of call; none: they are not known yet.
    """
    calls = sorted(calls)
    good = numbers_that_do(heads, calls)
    if size not in good:
        tokens = f" and calls of {', '.join(f'{count:,}' for count in calls)} tokens" if calls else ""
        raise MemFlowError(
            f"{size} processes cannot share a model of {heads} heads{tokens}: their number must divide both; "
            f"{', '.join(map(str, good))} would do"
        )

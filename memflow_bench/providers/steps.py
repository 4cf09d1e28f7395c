"""A training step around anyone's attention: forward, and the gradients of query, key and value."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def step(attend: Attend, query: Tensor, key: Tensor, value: Tensor, upstream: Tensor) -> Callable[[], tuple]:
    """A run of attend(query, key, value) [B, Lq, H, D] and its backward for `upstream`."""

    @torch.enable_grad()
    def run() -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in (query, key, value)]
        out = attend(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, upstream)

    return run


def backward(attend: Attend, query: Tensor, key: Tensor, value: Tensor, upstream: Tensor) -> Callable[[], tuple]:
    """A run of the backward alone: the forward is done once, here."""
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (query, key, value)]
        out = attend(*leaves)
    return lambda: (out.detach(), *torch.autograd.grad(out, leaves, upstream, retain_graph=True))

"""How a tensor lies in memory, without the tensor: what a launch can be planned by."""

from __future__ import annotations

from typing import NamedTuple

import torch

Sizes = tuple[int, ...]


class Layout(NamedTuple):
    """What a plan knows of a tensor; aligned: it begins at a multiple of 16 bytes."""

    dtype: torch.dtype
    shape: Sizes
    strides: Sizes
    aligned: bool


def describable(x: Layout) -> bool:
    """A descriptor needs a base and strides in whole 16 bytes."""
    size = x.dtype.itemsize
    return x.aligned and all(stride > 0 and stride * size % 16 == 0 for stride in x.strides[:3])


def by_token(x: Layout) -> tuple[Sizes, Sizes]:
    """Sizes and strides of [B, L, H, D] seen as [B, H, L, D]."""
    batch, tokens, heads, head_dim = x.shape
    per_batch, per_token, per_head, _ = x.strides
    return (batch, heads, tokens, head_dim), (per_batch, per_head, per_token, 1)


def by_frame(x: Layout, tokens_per_frame: int) -> tuple[Sizes, Sizes]:
    """Sizes and strides of [B, F*N, H, D] seen as [B, H, F, N, D]: the end of a frame is an end, too."""
    batch, tokens, heads, head_dim = x.shape
    per_batch, per_token, per_head, _ = x.strides
    sizes = (batch, heads, tokens // tokens_per_frame, tokens_per_frame, head_dim)
    return sizes, (per_batch, per_head, per_token * tokens_per_frame, per_token, 1)

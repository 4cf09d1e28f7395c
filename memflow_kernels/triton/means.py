"""frame_means, and the means that the other ops need: of blocks of queries, of counted text tokens, of partial sums."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import config
from .integers import cdiv


@triton.jit
def means_kernel(
    x,  # [B, L, H, D]
    mean,  # [B, S, H, D] float32
    mask,  # [B, L] bool: tokens that count; None: all of them
    slots,  # [segments]: the place of each segment in `mean`, -1 = none; None: its own number
    x_batch, x_token, x_head,
    mean_batch, mean_place, mean_head,
    tokens,  # L
    size,  # tokens of a segment; the last one may be shorter
    divisor,  # None: the number of tokens that count
    places,  # S
    head_dim,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One program: the mean over one segment of up to BLOCK_DIM channels of one head."""
    blocks = tl.cdiv(head_dim, BLOCK_DIM)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    dim = tl.program_id(0) % blocks * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    segment = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    place = segment.to(tl.int64)
    if slots is not None:
        place = tl.load(slots + segment).to(tl.int64)
    if (place >= 0) & (place < places):
        first = segment * size
        last = tl.minimum(first + size, tokens)
        rows = x + batch * x_batch + head * x_head + dim[None, :]
        total = tl.zeros([BLOCK_TOKENS, BLOCK_DIM], tl.float32)
        counted = tl.zeros([BLOCK_TOKENS], tl.int32)
        for start in tl.range(first, last, BLOCK_TOKENS, num_stages=STAGES):
            token = start + tl.arange(0, BLOCK_TOKENS)
            counts = token < last
            if mask is not None:
                counts = counts & (tl.load(mask + batch * tokens + token, counts, other=0) != 0)
            inside = counts[:, None] & (dim < head_dim)[None, :]
            total += tl.load(rows + token.to(tl.int64)[:, None] * x_token, inside, other=0.0).to(tl.float32)
            counted += counts.to(tl.int32)
        count = tl.maximum(tl.sum(counted, 0), 1) * 1.0 if divisor is None else divisor * 1.0
        target = mean + batch * mean_batch + place * mean_place + head * mean_head + dim
        tl.store(target, tl.sum(total, 0) / count, dim < head_dim)


def write_means(
    x: Tensor,
    mean: Tensor,
    size: int,
    *,
    mask: Tensor | None = None,
    slots: Tensor | None = None,
    divisor: int | None = None,
) -> None:
    """Means over every `size` tokens of x [B, L, H, D] go to mean [B, S, H, D]: segment i to place i, or slots[i].

    mask [B, L]: the tokens that count; divisor: divides the sums in place of the number of tokens.
    """
    batch, tokens, heads, head_dim = x.shape
    chosen = config("means", x.device)
    grid = (heads * cdiv(head_dim, chosen.blocks["BLOCK_DIM"]), cdiv(tokens, size), batch)
    if 0 in grid:
        return
    means_kernel[grid](
        x, mean, None if mask is None else mask.contiguous(), slots,
        *x.stride()[:3], *mean.stride()[:3],
        tokens, size, divisor, mean.shape[1], head_dim,
        **chosen.options, STAGES=chosen.stages,
    )  # fmt: skip


def segment_means(x: Tensor, size: int, mask: Tensor | None = None) -> Tensor:
    """x [B, L, H, D] -> [B, ceil(L / size), H, D] float32."""
    batch, tokens, heads, head_dim = x.shape
    mean = x.new_empty((batch, cdiv(tokens, size), heads, head_dim), dtype=torch.float32)
    write_means(x, mean, size, mask=mask)
    return mean


def frame_means(key: Tensor, tokens_per_frame: int) -> Tensor:
    """key [B, F*N, H, D] -> [B, F, H, D] float32. The key is read once, nothing else but the means is written."""
    return segment_means(key, tokens_per_frame)

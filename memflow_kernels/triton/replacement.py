"""replace_frame: one remembered frame gives its slot to another, per batch row, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .configs import config


@triton.jit
def replace_kernel(
    key, value,  # [B, S*N, H, D], a frame seen as [tokens, heads, width]
    mean,  # [B, S, H, D] float32
    slot, source_slot,  # [B] int32
    key_batch, key_frame, key_token, key_head,
    value_batch, value_frame, value_token, value_head,
    mean_batch, mean_place, mean_head,
    slots, heads, width, mean_heads, head_dim,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK elements of one row of a frame's key and value; the first also moves the mean."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    to, origin = tl.load(slot + batch).to(tl.int64), tl.load(source_slot + batch).to(tl.int64)
    if (to >= 0) & (to < slots) & (origin >= 0) & (origin < slots) & (to != origin):
        keys = key + batch * key_batch + token * key_token + head * key_head + column
        values = value + batch * value_batch + token * value_token + head * value_head + column
        inside = column < width
        new_key = tl.load(keys + origin * key_frame, inside)
        new_value = tl.load(values + origin * value_frame, inside)
        tl.store(keys + to * key_frame, new_key, inside)
        tl.store(values + to * value_frame, new_value, inside)
        if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
            for start in range(0, mean_heads * head_dim, BLOCK):
                channel = start + tl.arange(0, BLOCK)
                means = mean + batch * mean_batch + channel // head_dim * mean_head + channel % head_dim
                inside = channel < mean_heads * head_dim
                tl.store(means + to * mean_place, tl.load(means + origin * mean_place, inside), inside)


def replace_frame(
    pool_key: Tensor, pool_value: Tensor, pool_frame_mean: Tensor, slot: Tensor, source_slot: Tensor
) -> None:
    """Per row b, copy the frame in source_slot[b] over the one in slot[b]; nothing where either is outside the pool."""
    batch, tokens, heads, head_dim = pool_key.shape
    slots = pool_frame_mean.shape[1]
    per_frame = tokens // slots
    parts = (pool_key, pool_value)
    strides = [
        number
        for batch_stride, token_stride, head_stride, _ in (part.stride() for part in parts)
        for number in (batch_stride, per_frame * token_stride, token_stride, head_stride)
    ]
    if all(part.stride()[1:] == (heads * head_dim, head_dim, 1) for part in parts):
        rows, columns, width = 1, 1, per_frame * heads * head_dim  # a frame is one dense run
    else:
        rows, columns, width = per_frame, heads, head_dim
    chosen = config("replace", pool_key.device)
    replace_kernel[(triton.cdiv(width, chosen.blocks["BLOCK"]), rows * columns, batch)](
        *parts, pool_frame_mean, slot.contiguous(), source_slot.contiguous(),
        *strides, *pool_frame_mean.stride()[:3],
        slots, columns, width, heads, head_dim,
        **chosen.options,
    )  # fmt: skip

"""replace_frame: one remembered frame gives its slot to another, per batch row, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .configs import config
from .integers import cdiv, next_power_of_2


@triton.jit(do_not_specialize=["slots", "runs", "inner", "mean_heads"])
def replace_kernel(
    key, value,  # [B, S*N, H, D], a frame seen as [outer, inner] runs of `width` elements
    mean,  # [B, S, H, D] float32
    slot, source_slot,  # [B] int32
    key_batch, key_frame, key_outer, key_inner,
    value_batch, value_frame, value_outer, value_inner,
    mean_batch, mean_place, mean_head,
    slots, runs, inner, width, mean_heads, head_dim,
    RUNS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK elements of RUNS runs of a frame's key and value; the first also moves the mean."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    run = tl.program_id(1) * RUNS + tl.arange(0, RUNS)[:, None]
    batch = tl.program_id(2).to(tl.int64)
    to, origin = tl.load(slot + batch).to(tl.int64), tl.load(source_slot + batch).to(tl.int64)
    if (to >= 0) & (to < slots) & (origin >= 0) & (origin < slots) & (to != origin):
        first, second = (run // inner).to(tl.int64), (run % inner).to(tl.int64)
        keys = key + batch * key_batch + first * key_outer + second * key_inner + column
        values = value + batch * value_batch + first * value_outer + second * value_inner + column
        inside = (run < runs) & (column < width)
        new_key = tl.load(keys + origin * key_frame, inside)
        new_value = tl.load(values + origin * value_frame, inside)
        tl.store(keys + to * key_frame, new_key, inside)
        tl.store(values + to * value_frame, new_value, inside)
        if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
            for start in range(0, mean_heads * head_dim, BLOCK):
                channel = start + tl.arange(0, BLOCK)
                means = mean + batch * mean_batch + channel // head_dim * mean_head + channel % head_dim
                exists = channel < mean_heads * head_dim
                tl.store(means + to * mean_place, tl.load(means + origin * mean_place, exists), exists)


def runs_of_a_frame(parts: tuple[Tensor, Tensor], tokens: int) -> tuple[int, int, int, list[tuple[int, int]]]:
    """How a frame of `tokens` tokens of parts [B, L, H, D] lies in memory: in outer * inner runs of `width` elements.

    Returns outer, inner, width and for each part the strides of the outer and the inner runs. A frame of the pool is
    one run per head; of a token-major buffer, one run in all.
    """
    heads, head_dim = parts[0].shape[2:]
    strides = [part.stride()[1:3] for part in parts]
    if all(stride == (heads * head_dim, head_dim) for stride in strides):
        return 1, 1, tokens * heads * head_dim, [(0, 0), (0, 0)]
    if all(per_token == head_dim for per_token, _ in strides):
        return 1, heads, tokens * head_dim, [(0, per_head) for _, per_head in strides]
    if all(per_head == head_dim for _, per_head in strides):
        return 1, tokens, heads * head_dim, [(0, per_token) for per_token, _ in strides]
    return tokens, heads, head_dim, strides


def replace_frame(
    pool_key: Tensor, pool_value: Tensor, pool_frame_mean: Tensor, slot: Tensor, source_slot: Tensor
) -> None:
    """Per row b, copy the frame in source_slot[b] over the one in slot[b]; nothing where either is outside the pool."""
    batch, tokens, heads, head_dim = pool_key.shape
    slots = pool_frame_mean.shape[1]
    per_frame = tokens // slots
    parts = (pool_key, pool_value)
    outer, inner, width, run_strides = runs_of_a_frame(parts, per_frame)
    strides = [
        number
        for part, of_runs in zip(parts, run_strides, strict=True)
        for number in (part.stride(0), per_frame * part.stride(1), *of_runs)
    ]
    options = config("replace", pool_key.device).options
    block = min(options["BLOCK"], next_power_of_2(width))
    at_once = min(options["BLOCK"] // block, next_power_of_2(outer * inner))
    replace_kernel[(cdiv(width, block), cdiv(outer * inner, at_once), batch)](
        *parts, pool_frame_mean, slot.contiguous(), source_slot.contiguous(),
        *strides, *pool_frame_mean.stride()[:3],
        slots, outer * inner, inner, width, heads, head_dim,
        **options | {"RUNS": at_once, "BLOCK": block},
    )  # fmt: skip

"""qk_norm_rope and qk_norm_rope_write: RMS norm over all heads, 3-axis rotary, and the write into the pool.

One program takes a run of tokens of one frame and holds whole tokens, all heads together: query, key and value are read
once and written once. The sums of the new keys, and of the new queries where their mean is wanted, leave a program as
one row each; a second, small launch adds those rows up in a fixed order, so that the result is the same every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import config
from .rotary import axis_speeds, rotate, token_turns


@triton.jit
def inverse_rms(x, channels, eps):
    """x [BLOCK_TOKENS, BLOCK_HEADS, BLOCK_DIM] float32, 0 outside -> 1 / sqrt(mean(x^2) + eps) of every token."""
    mean_square = tl.div_rn(tl.sum(tl.sum(x * x, 2), 1), channels * 1.0)
    return tl.div_rn(1.0, tl.sqrt_rn(mean_square + eps))[:, None, None]


@triton.jit
def norm_rotate(raw, weight, channels, eps, cos, sin):
    """Tokens [BLOCK_TOKENS, BLOCK_HEADS, BLOCK_DIM], normed, weighted and turned; each step rounds to their dtype."""
    x = raw.to(tl.float32)
    normed = (x * inverse_rms(x, channels, eps)).to(raw.dtype).to(tl.float32)
    weighted = (normed * weight).to(raw.dtype).to(tl.float32)
    return rotate(weighted, cos, sin).to(raw.dtype)


@triton.jit
def first_number(start_frame, start):
    """Number of the first frame, int64: start_frame, plus what `start` points to."""
    first = tl.cast(start_frame, tl.int64)
    if start is not None:
        first += tl.load(start).to(tl.int64)
    return first


@triton.jit(do_not_specialize=["start_frame"])
def norm_rope_kernel(
    query, key, value,  # [B, L, H, D]; value None: nothing goes to a pool
    weight_q, weight_k,  # [H*D]
    new_query,  # [B, L, H, D], contiguous
    new_key,  # [B, L, H, D], contiguous; with a pool: its key
    pool_value,
    key_sums,  # [B, frames * runs, H, D] float32, contiguous: sums of the new keys over each run of tokens
    query_sums,  # the same of the new queries; None: not wanted
    slots,  # [frames] int32
    start,  # one integer or None
    query_batch, query_token, query_head,
    key_batch, key_token, key_head,
    value_batch, value_token, value_head,
    new_key_batch, new_key_token, new_key_head,
    pool_value_batch, pool_value_token, pool_value_head,
    tokens, heads, head_dim, rows, cols, start_frame, places, eps,
    RUN: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One program: up to RUN tokens of one frame of one batch row, BLOCK_TOKENS of them at a time."""
    run, frame, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    per_frame = rows * cols
    channels = heads * head_dim
    head, dim = tl.arange(0, BLOCK_HEADS)[None, :, None], tl.arange(0, BLOCK_DIM)[None, None, :]
    exists = (head < heads) & (dim < head_dim)
    wide_weight_q = tl.load(weight_q + head * head_dim + dim, exists, other=0.0).to(tl.float32)
    wide_weight_k = tl.load(weight_k + head * head_dim + dim, exists, other=0.0).to(tl.float32)
    axis, speed = axis_speeds(tl.arange(0, BLOCK_DIM // 2)[None, None, :], head_dim // 2)
    first_frame = first_number(start_frame, start)
    slot = frame.to(tl.int64)
    if value is not None:
        slot = tl.load(slots + frame).to(tl.int64)
    kept_heads = tl.where((slot >= 0) & (slot < places), heads, 0)  # 0: this frame is not stored

    wide_head = head.to(tl.int64)
    queries = query + batch * query_batch + wide_head * query_head + dim
    keys = key + batch * key_batch + wide_head * key_head + dim
    new_queries = new_query + batch * tokens * channels + head * head_dim + dim
    new_keys = new_key + batch * new_key_batch + wide_head * new_key_head + dim
    total_key = tl.zeros([BLOCK_TOKENS, BLOCK_HEADS, BLOCK_DIM], tl.float32)
    total_query = tl.zeros([BLOCK_TOKENS, BLOCK_HEADS, BLOCK_DIM], tl.float32)
    last = tl.minimum(run * RUN + RUN, per_frame)
    for first in tl.range(run * RUN, last, BLOCK_TOKENS, num_stages=STAGES):
        offset = first + tl.arange(0, BLOCK_TOKENS)
        inside = (offset < last)[:, None, None] & exists
        kept = inside & (head < kept_heads)
        token = (frame * per_frame + offset).to(tl.int64)[:, None, None]
        target = (slot * per_frame + offset)[:, None, None]
        # all loads first, so that they wait for memory together
        raw_query = tl.load(queries + token * query_token, inside, other=0.0)
        raw_key = tl.load(keys + token * key_token, kept, other=0.0)
        if value is not None:
            values = value + batch * value_batch + wide_head * value_head + dim
            raw_value = tl.load(values + token * value_token, kept, other=0.0)
        cos, sin = token_turns(frame * per_frame + offset, first_frame, rows, cols, axis, speed)
        turned_query = norm_rotate(raw_query, wide_weight_q, channels, eps, cos, sin)
        tl.store(new_queries + token * channels, turned_query, inside)
        if query_sums is not None:
            total_query += tl.where(inside, turned_query.to(tl.float32), 0.0)
        turned_key = norm_rotate(raw_key, wide_weight_k, channels, eps, cos, sin)
        tl.store(new_keys + target * new_key_token, turned_key, kept)
        if value is not None:
            held = pool_value + batch * pool_value_batch + wide_head * pool_value_head + dim
            tl.store(held + target * pool_value_token, raw_value, kept)
            total_key += tl.where(kept, turned_key.to(tl.float32), 0.0)
    row = (batch * tl.num_programs(1) + frame) * tl.num_programs(0) + run
    place = row * channels + head * head_dim + dim
    if value is not None:
        tl.store(key_sums + place, tl.sum(total_key, 0)[None, :, :], exists)
    if query_sums is not None:
        tl.store(query_sums + place, tl.sum(total_query, 0)[None, :, :], exists)


@triton.jit
def store_mean(
    sums, target,  # one head: rows of sums, `channels` apart, and where their mean goes
    first, last, tokens, channels, dim, head_dim,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The sum of the rows from `first` to `last`, divided by `tokens`."""
    total = tl.zeros([BLOCK_TOKENS, BLOCK_DIM], tl.float32)
    for start in tl.range(first, last, BLOCK_TOKENS, num_stages=STAGES):
        row = start + tl.arange(0, BLOCK_TOKENS)
        inside = (row < last)[:, None] & (dim < head_dim)[None, :]
        total += tl.load(sums + row.to(tl.int64)[:, None] * channels + dim[None, :], inside, other=0.0)
    tl.store(target + dim, tl.sum(total, 0) / (tokens * 1.0), dim < head_dim)


@triton.jit
def norm_rope_means_kernel(
    key_sums, query_sums,  # [B, frames * runs, H, D] float32, contiguous; query_sums None: no mean of the queries
    frame_mean,  # [B, S, H, D] float32
    query_mean,  # [B, H, D] float32, contiguous
    slots,  # [frames] int32
    mean_batch, mean_place, mean_head,
    frames, runs, per_frame, places, head_dim,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One program: up to BLOCK_DIM channels of one head of a frame's mean key; past the frames, of the mean query."""
    blocks = tl.cdiv(head_dim, BLOCK_DIM)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    dim = tl.program_id(0) % blocks * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    frame, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    channels = tl.num_programs(0) // blocks * head_dim
    here = batch * frames * runs * channels + head * head_dim
    # A call in each branch: the AMD compiler of Triton 3.6 cannot follow pointers that branches choose between.
    if frame < frames:
        slot = tl.load(slots + frame).to(tl.int64)
        if (slot >= 0) & (slot < places):
            target = frame_mean + batch * mean_batch + slot * mean_place + head * mean_head
            store_mean(
                key_sums + here, target, frame * runs, (frame + 1) * runs, per_frame, channels, dim, head_dim,
                BLOCK_TOKENS, BLOCK_DIM, STAGES,
            )  # fmt: skip
    elif query_sums is not None:
        target = query_mean + batch * channels + head * head_dim
        store_mean(
            query_sums + here, target, 0, frames * runs, frames * per_frame, channels, dim, head_dim,
            BLOCK_TOKENS, BLOCK_DIM, STAGES,
        )  # fmt: skip


def launch_options(kernel: str, heads: int, head_dim: int, device: torch.device) -> dict[str, int]:
    """Options of a launch: as many tokens at a time as make up a tile of TILE numbers, 16 per thread at most."""
    options = config(kernel, device).options
    heads, head_dim = triton.next_power_of_2(heads), triton.next_power_of_2(head_dim)
    at_once = max(min(options.pop("TILE") // (heads * head_dim), triton.next_power_of_2(options["RUN"])), 1)
    options["num_warps"] = max(options["num_warps"], at_once * heads * head_dim // 512)
    blocks = {"BLOCK_TOKENS": at_once, "BLOCK_HEADS": heads, "BLOCK_DIM": head_dim}
    return {**options, **blocks, "STAGES": options["num_stages"]}


def _launch(states, weights, eps, rows, cols, start_frame, start, new_key, pool=None, slots=None, sums=(None, None)):
    """states: query, key and, with a pool, value -> the new query; the new keys go to new_key or to the pool."""
    query, key = states[:2]
    value = states[2] if pool else None
    batch, tokens, heads, head_dim = query.shape
    new_query = query.new_empty(query.shape)
    options = launch_options("norm_rope", heads, head_dim, query.device)
    frames = tokens // (rows * cols)
    held = pool[1] if pool else new_key
    norm_rope_kernel[(triton.cdiv(rows * cols, options["RUN"]), frames, batch)](
        query, key, value, *(weight.contiguous() for weight in weights),
        new_query, new_key, held, *sums, slots, start,
        *query.stride()[:3], *key.stride()[:3], *(key if value is None else value).stride()[:3],
        *new_key.stride()[:3], *held.stride()[:3],
        tokens, heads, head_dim, rows, cols, start_frame, pool[2].shape[1] if pool else frames, eps,
        **options,
    )  # fmt: skip
    return new_query


def qk_norm_rope(
    query: Tensor,
    key: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    eps: float,
    rows: int,
    cols: int,
    start_frame: int,
    start: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """query, key [B, L, H, D], weight_* [H*D] -> the same; the first frame has number start_frame + start."""
    new_key = key.new_empty(key.shape)
    return _launch((query, key), (weight_q, weight_k), eps, rows, cols, start_frame, start, new_key), new_key


def qk_norm_rope_write(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    eps: float,
    rows: int,
    cols: int,
    start_frame: int,
    start: Tensor | None,
    pool_key: Tensor,
    pool_value: Tensor,
    pool_frame_mean: Tensor,
    slots: Tensor,
    query_mean: bool,
) -> tuple[Tensor, Tensor]:
    """Norm and rotate query and key; key, value and the mean key of every frame go to its slot of the pool.

    A frame whose slot is outside the pool is not stored. Returns the new query and, with query_mean, its mean [B, H, D]
    (otherwise an empty tensor).
    """
    batch, _, heads, head_dim = query.shape
    states, pool, slots = (query, key, value), (pool_key, pool_value, pool_frame_mean), slots.contiguous()
    frames, runs = slots.shape[0], triton.cdiv(rows * cols, config("norm_rope", query.device).blocks["RUN"])
    key_sums = query.new_empty((batch, frames * runs, heads, head_dim), dtype=torch.float32)
    sums = key_sums, torch.empty_like(key_sums) if query_mean else None
    place = (eps, rows, cols, start_frame, start)
    new_query = _launch(states, (weight_q, weight_k), *place, pool_key, pool, slots, sums)
    mean = query.new_empty((batch, heads, head_dim) if query_mean else (0,), dtype=torch.float32)
    means = config("means", query.device)
    grid = (heads * triton.cdiv(head_dim, means.blocks["BLOCK_DIM"]), frames + query_mean, batch)
    norm_rope_means_kernel[grid](
        *sums, pool_frame_mean, mean, slots, *pool_frame_mean.stride()[:3],
        frames, runs, rows * cols, pool_frame_mean.shape[1], head_dim,
        **means.options, STAGES=means.stages,
    )  # fmt: skip
    return new_query, mean

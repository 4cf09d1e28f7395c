"""qk_norm_rope and qk_norm_rope_write: RMS norm over all heads, 3-axis rotary, and the write into the pool.

One program takes a run of tokens of one frame and holds whole tokens, all heads together: query, key and value are read
once and written once. The sums of the new keys leave a program as one row; a second, small launch adds those rows to
the frame means in a fixed order, so that the result is the same every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import config
from .means import write_means
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
    sums,  # [B, frames * runs, H, D] float32, contiguous: sums of the new keys over each run of tokens
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
    total = tl.zeros([BLOCK_TOKENS, BLOCK_HEADS, BLOCK_DIM], tl.float32)
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
        turned_key = norm_rotate(raw_key, wide_weight_k, channels, eps, cos, sin)
        tl.store(new_keys + target * new_key_token, turned_key, kept)
        if value is not None:
            held = pool_value + batch * pool_value_batch + wide_head * pool_value_head + dim
            tl.store(held + target * pool_value_token, raw_value, kept)
            total += tl.where(kept, turned_key.to(tl.float32), 0.0)
    if value is not None:
        row = (batch * tl.num_programs(1) + frame) * tl.num_programs(0) + run
        tl.store(sums + row * channels + head * head_dim + dim, tl.sum(total, 0)[None, :, :], exists)


@triton.jit(do_not_specialize=["start_frame"])
def norm_rope_backward_kernel(
    grad, x,  # [B, L, H, D]
    weight,  # [H*D]
    grad_x,  # [B, L, H, D], contiguous
    sums,  # [programs, H*D] float32: gradient of the weight, one row per program
    start,
    grad_batch, grad_token, grad_head,
    x_batch, x_token, x_head,
    tokens, heads, head_dim, rows, cols, start_frame, eps,
    RUN: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One program: up to RUN tokens of one batch row. With n = x r, r = 1 / rms, g = grad turned back:

    d weight = sum g n; d x = r (g w - n mean(g w n)). The roundings of the forward count as the identity.
    """
    run, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channels = heads * head_dim
    head, dim = tl.arange(0, BLOCK_HEADS)[None, :, None], tl.arange(0, BLOCK_DIM)[None, None, :]
    exists = (head < heads) & (dim < head_dim)
    wide_weight = tl.load(weight + head * head_dim + dim, exists, other=0.0).to(tl.float32)
    axis, speed = axis_speeds(tl.arange(0, BLOCK_DIM // 2)[None, None, :], head_dim // 2)
    first_frame = first_number(start_frame, start)
    wide_head = head.to(tl.int64)
    grads = grad + batch * grad_batch + wide_head * grad_head + dim
    states = x + batch * x_batch + wide_head * x_head + dim
    targets = grad_x + batch * tokens * channels + head * head_dim + dim
    total = tl.zeros([BLOCK_TOKENS, BLOCK_HEADS, BLOCK_DIM], tl.float32)
    last = tl.minimum(run * RUN + RUN, tokens)
    for first in tl.range(run * RUN, last, BLOCK_TOKENS, num_stages=STAGES):
        place = first + tl.arange(0, BLOCK_TOKENS)
        inside = (place < last)[:, None, None] & exists
        token = place.to(tl.int64)[:, None, None]
        raw_grad = tl.load(grads + token * grad_token, inside, other=0.0)
        wide = tl.load(states + token * x_token, inside, other=0.0).to(tl.float32)
        cos, sin = token_turns(place, first_frame, rows, cols, axis, speed)
        back = rotate(raw_grad.to(tl.float32), cos, -sin)
        inverse = inverse_rms(wide, channels, eps)
        normed = wide * inverse
        total += tl.where(inside, back * normed, 0.0)
        back *= wide_weight
        mean = tl.sum(tl.sum(back * normed, 2), 1)[:, None, None] / (channels * 1.0)
        tl.store(targets + token * channels, (inverse * (back - normed * mean)).to(grad_x.dtype.element_ty), inside)
    row = batch * tl.num_programs(0) + run
    tl.store(sums + row * channels + head * head_dim + dim, tl.sum(total, 0)[None, :, :], exists)


def _options(kernel: str, heads: int, head_dim: int, device: torch.device) -> dict[str, int]:
    """Options of a launch: as many tokens at a time as make up a tile of TILE numbers, 16 per thread at most."""
    options = config(kernel, device).options
    heads, head_dim = triton.next_power_of_2(heads), triton.next_power_of_2(head_dim)
    at_once = max(min(options.pop("TILE") // (heads * head_dim), triton.next_power_of_2(options["RUN"])), 1)
    options["num_warps"] = max(options["num_warps"], at_once * heads * head_dim // 512)
    blocks = {"BLOCK_TOKENS": at_once, "BLOCK_HEADS": heads, "BLOCK_DIM": head_dim}
    return {**options, **blocks, "STAGES": options["num_stages"]}


def _launch(states, weights, eps, rows, cols, start_frame, start, pool=None, slots=None):
    """states: query, key and, with a pool, value -> the new query and the new key; with a pool the sums of the keys."""
    query, key = states[:2]
    value = states[2] if pool else None
    batch, tokens, heads, head_dim = query.shape
    new_query = query.new_empty(query.shape)
    new_key = pool[0] if pool else key.new_empty(key.shape)
    options = _options("norm_rope", heads, head_dim, query.device)
    frames = tokens // (rows * cols)
    grid = (triton.cdiv(rows * cols, options["RUN"]), frames, batch)
    sums = query.new_empty((batch, frames * grid[0], heads, head_dim), dtype=torch.float32) if pool else None
    held = pool[1] if pool else new_key
    norm_rope_kernel[grid](
        query, key, value, *(weight.contiguous() for weight in weights),
        new_query, new_key, held, sums, slots, start,
        *query.stride()[:3], *key.stride()[:3], *(key if value is None else value).stride()[:3],
        *new_key.stride()[:3], *held.stride()[:3],
        tokens, heads, head_dim, rows, cols, start_frame, pool[2].shape[1] if pool else frames, eps,
        **options,
    )  # fmt: skip
    return new_query, sums if pool else new_key


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
    return _launch((query, key), (weight_q, weight_k), eps, rows, cols, start_frame, start)


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
) -> Tensor:
    """Norm and rotate query and key; key, value and the mean key of every frame go to its slot of the pool.

    A frame whose slot is outside the pool is not stored.
    """
    states, weights = (query, key, value), (weight_q, weight_k)
    pool, slots = (pool_key, pool_value, pool_frame_mean), slots.contiguous()
    new_query, sums = _launch(states, weights, eps, rows, cols, start_frame, start, pool, slots)
    write_means(sums, pool_frame_mean, sums.shape[1] // slots.shape[0], slots=slots, divisor=rows * cols)
    return new_query


def _backward(grad, x, weight, eps, rows, cols, start_frame, start):
    """Gradients of one of query and key, and of its weight."""
    batch, tokens, heads, head_dim = x.shape
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    grad_x = x.new_empty(x.shape)
    options = _options("norm_rope_backward", heads, head_dim, x.device)
    runs = triton.cdiv(tokens, options["RUN"])
    sums = x.new_empty((1, batch * runs, heads, head_dim), dtype=torch.float32)
    norm_rope_backward_kernel[(runs, batch)](
        grad, x, weight.contiguous(), grad_x, sums, start,
        *grad.stride()[:3], *x.stride()[:3],
        tokens, heads, head_dim, rows, cols, start_frame, eps,
        **options,
    )  # fmt: skip
    grad_weight = x.new_empty((1, 1, heads, head_dim), dtype=torch.float32)
    write_means(sums, grad_weight, sums.shape[1], divisor=1)
    return grad_x, grad_weight.flatten().to(weight.dtype)


def qk_norm_rope_backward(
    grad_query: Tensor,
    grad_key: Tensor,
    query: Tensor,
    key: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    eps: float,
    rows: int,
    cols: int,
    start_frame: int,
    start: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, weight_q, weight_k; the same every time."""
    place = (eps, rows, cols, start_frame, start)
    grad_query, grad_weight_q = _backward(grad_query, query, weight_q, *place)
    grad_key, grad_weight_k = _backward(grad_key, key, weight_k, *place)
    return grad_query, grad_key, grad_weight_q, grad_weight_k

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
from .integers import cdiv, next_power_of_2
from .pairs import nvidia
from .qk_norm_rope_tiles import norm_rope_kernel


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


@triton.jit(do_not_specialize=["frames", "runs", "per_frame", "places"])
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


def _launch_options(query: Tensor) -> dict[str, int]:
    """A token in at most MOST_PIECES tiles of PIECE numbers or more; so many tokens that a tile has TILE numbers."""
    chosen = config("norm_rope", query.device)
    tile, piece, most, run = (chosen.blocks[name] for name in ("TILE", "PIECE", "MOST_PIECES", "RUN"))
    heads, head_dim = query.shape[2:]
    dims = next_power_of_2(head_dim)
    together = max(piece // dims, next_power_of_2(cdiv(heads, most)))
    together = min(together, next_power_of_2(heads))
    return {
        "RUN": run,
        "BLOCK_TOKENS": min(max(tile // (together * dims), 1), next_power_of_2(run)),
        "BLOCK_HEADS": together,
        "BLOCK_DIM": dims,
        "PIECES": cdiv(heads, together),
        "LANE": 8 if query.element_size() == 2 and dims >= 8 else 0,
        "NVIDIA": nvidia(query.device),
        "STAGES": chosen.stages,
        "num_warps": max(chosen.warps, together * dims // 256),
        "num_stages": chosen.stages,
    }


def _launch(states, weights, eps, rows, cols, start_frame, start, new_key, pool=None, slots=None, sums=(None, None)):
    """states: query, key and, with a pool, value -> the new query; the new keys go to new_key or to the pool."""
    query, key = states[:2]
    value = states[2] if pool else None
    batch, tokens, heads, head_dim = query.shape
    new_query = query.new_empty(query.shape)
    options = _launch_options(query)
    frames = tokens // (rows * cols)
    held = pool[1] if pool else new_key
    norm_rope_kernel[(cdiv(rows * cols, options["RUN"]), frames, batch)](
        query, key, value, *(None if weight is None else weight.contiguous() for weight in weights),
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
    weight_q: Tensor | None,
    weight_k: Tensor | None,
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

    Without weights query and key are normed already. A frame whose slot is outside the pool is not stored. Returns the
    new query and, with query_mean, its mean [B, H, D] (otherwise an empty tensor).
    """
    batch, _, heads, head_dim = query.shape
    states, pool, slots = (query, key, value), (pool_key, pool_value, pool_frame_mean), slots.contiguous()
    frames, runs = slots.shape[0], cdiv(rows * cols, config("norm_rope", query.device).blocks["RUN"])
    key_sums = query.new_empty((batch, frames * runs, heads, head_dim), dtype=torch.float32)
    sums = key_sums, torch.empty_like(key_sums) if query_mean else None
    place = (eps, rows, cols, start_frame, start)
    new_query = _launch(states, (weight_q, weight_k), *place, pool_key, pool, slots, sums)
    mean = query.new_empty((batch, heads, head_dim) if query_mean else (0,), dtype=torch.float32)
    means = config("means", query.device)
    grid = (heads * cdiv(head_dim, means.blocks["BLOCK_DIM"]), frames + query_mean, batch)
    norm_rope_means_kernel[grid](
        *sums, pool_frame_mean, mean, slots, *pool_frame_mean.stride()[:3],
        frames, runs, rows * cols, pool_frame_mean.shape[1], head_dim,
        **means.options, STAGES=means.stages,
    )  # fmt: skip
    return new_query, mean

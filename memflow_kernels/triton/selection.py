"""select_frames: the candidate frames that each head attends to, in two launches."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import config
from .integers import cdiv, next_power_of_2
from .means import segment_means


@triton.jit
def select_kernel(
    mean_query,  # [B, blocks, H, D] float32, contiguous
    frame_mean,  # [B, F, H, D] float32
    valid,  # [B, F] bool, contiguous, or None
    table,  # [B, H, blocks, places] int32, contiguous
    mean_batch, mean_frame, mean_head,
    heads, blocks, frames, head_dim, places,
    BLOCK_FRAMES: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """One program: the choice of one head for one block of queries."""
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    frame = tl.arange(0, BLOCK_FRAMES)
    score = tl.zeros([BLOCK_FRAMES], tl.float32)
    query = mean_query + ((batch * blocks + block) * heads + head) * head_dim
    keys = frame_mean + batch * mean_batch + head.to(tl.int64) * mean_head + frame.to(tl.int64)[:, None] * mean_frame
    for start in range(0, head_dim, BLOCK_DIM):
        dim = start + tl.arange(0, BLOCK_DIM)
        inside = (frame < frames)[:, None] & (dim < head_dim)[None, :]
        part = tl.load(keys + dim[None, :], inside, other=0.0)  # [BLOCK_FRAMES, BLOCK_DIM]
        score += tl.sum(part * tl.load(query + dim, dim < head_dim, other=0.0)[None, :], 1)

    free = frame < frames
    if valid is not None:
        free = free & (tl.load(valid + batch * frames + frame, free, other=0) != 0)
    chosen = tl.zeros([BLOCK_FRAMES], tl.int32)
    nan = score != score  # counts as the largest score, as in a sort
    for _ in range(places):
        best = tl.max(tl.where(free & (nan == 0), score, float("-inf")), 0)
        equal = tl.where(tl.sum((free & nan).to(tl.int32), 0) > 0, nan, score == best)
        winner = tl.min(tl.where(free & equal, frame, BLOCK_FRAMES), 0)  # of equal scores, the lower index
        chosen = tl.where(frame == winner, 1, chosen)
        free = free & (frame != winner)

    row = table + ((batch * heads + head) * blocks + block) * places
    tl.store(row + tl.cumsum(chosen, 0) - 1, frame, chosen != 0)
    tl.store(row + frame, -1, (frame >= tl.sum(chosen, 0)) & (frame < places))


def _options(frames: int, head_dim: int, device: torch.device) -> dict[str, int]:
    """Options of a launch: all frames, and as many channels at a time as make up a tile of BLOCK_TILE numbers."""
    options = config("select", device).options
    block = next_power_of_2(frames)
    channels = max(min(options.pop("BLOCK_TILE") // block, next_power_of_2(head_dim)), 1)
    return {"BLOCK_FRAMES": block, "BLOCK_DIM": channels, **options}


def select_frames(
    query: Tensor, frame_mean: Tensor, top_k: int, valid: Tensor | None, query_block: int | None
) -> Tensor:
    """query [B, Lq, H, D], frame_mean [B, F, H, D] -> [B, H, k] int32; [B, H, blocks, k] with query_block."""
    batch, queries, heads, head_dim = query.shape
    frames = frame_mean.shape[1]
    places = min(top_k, frames)
    size = queries if query_block is None else min(query_block, queries)
    blocks = cdiv(queries, size)
    table = query.new_empty((batch, heads, blocks, places), dtype=torch.int32)
    if places:
        known = size == 1 and query.dtype == torch.float32 and query.is_contiguous()
        mean_query = query if known else segment_means(query, size)
        select_kernel[(blocks, heads, batch)](
            mean_query, frame_mean, None if valid is None else valid.contiguous(), table,
            *frame_mean.stride()[:3],
            heads, blocks, frames, head_dim, places,
            **_options(frames, head_dim, query.device),
        )  # fmt: skip
    return table.squeeze(2) if query_block is None else table

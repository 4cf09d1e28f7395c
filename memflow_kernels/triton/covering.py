"""cover_frames: the frames that together score high for every token, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .relevance_tiles import tile_sizes

MOST = tl.constexpr(torch.finfo(torch.float32).max)


@triton.jit
def cover_kernel(
    scores,  # [R, T, F]
    weights,  # [R, T] float32
    prior,  # [R, F] float32
    table,  # [R, places] int32, contiguous
    score_row, score_token, score_frame,
    weight_row, weight_token,
    prior_row, prior_frame,
    tokens, frames, places,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_FRAMES: tl.constexpr,
):  # fmt: skip
    """One program: all choices of one row. What a token has reached is worked out anew from the frames taken, which the
    sum reads anyway, so that nothing is kept between choices but which frames are taken."""
    row = tl.program_id(0).to(tl.int64)
    frame = tl.arange(0, BLOCK_FRAMES)
    wide = frame.to(tl.int64)
    bonus = tl.load(prior + row * prior_row + wide * prior_frame, frame < frames, other=float("-inf"))
    usable = bonus > float("-inf")
    taken = tl.zeros([BLOCK_FRAMES], tl.int32)
    for place in range(places):
        gain = tl.zeros([BLOCK_FRAMES], tl.float32)
        for start in range(0, tokens, BLOCK_TOKENS):
            token = start + tl.arange(0, BLOCK_TOKENS)
            far = token.to(tl.int64)
            weight = tl.load(weights + row * weight_row + far * weight_token, token < tokens, other=0.0)
            counts = weight > 0
            places_of = scores + row * score_row + far[:, None] * score_token + wide[None, :] * score_frame
            score = tl.load(places_of, counts[:, None] & usable[None, :], other=float("-inf")).to(tl.float32)
            score = tl.minimum(tl.where(score == score, score, float("-inf")), MOST)
            low = tl.min(tl.where(score > float("-inf"), score, MOST), 1)
            best = tl.maximum(low, tl.max(tl.where((taken != 0)[None, :], score, float("-inf")), 1))
            raised = tl.maximum(score - best[:, None], 0.0) * tl.minimum(weight, MOST)[:, None]
            gain += tl.sum(tl.where(counts[:, None], raised, 0.0), 0)
        free = usable & (taken == 0)
        worth = tl.where(free, gain + bonus, float("-inf"))
        winner = tl.min(tl.where(free & (worth == tl.max(worth, 0)), frame, BLOCK_FRAMES), 0)
        tl.store(table + row * places + place, tl.where(winner < BLOCK_FRAMES, winner, -1))
        taken = tl.where(frame == winner, 1, taken)


def cover_frames(scores: Tensor, weights: Tensor, k: int, prior: Tensor) -> Tensor:
    """scores [R, T, F], weights [R, T], prior [R, F] -> [R, min(k, F)] int32 in the order of being chosen."""
    rows, tokens, frames = scores.shape
    table = scores.new_empty((rows, min(k, frames)), dtype=torch.int32)
    if table.numel():
        cover_kernel[(rows,)](
            scores, weights, prior, table,
            *scores.stride(), *weights.stride(), *prior.stride(),
            tokens, frames, table.shape[1],
            **tile_sizes("cover", frames, scores.device),
        )  # fmt: skip
    return table

"""prompt_relevance: how much the prompt calls for each remembered frame.

"mean": means of the text tokens that count, then one product per frame. "softmax": every program streams over the keys
of one frame and keeps a log-sum-exp per text token; shares come from those, and no score matrix is ever stored.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import config
from .integers import next_power_of_2
from .means import segment_means
from .relevance_backward import prompt_relevance_softmax_backward
from .relevance_tiles import frame_lse, load_tokens, tile_sizes

__all__ = ["prompt_relevance_mean", "prompt_relevance_softmax", "prompt_relevance_softmax_backward"]


@triton.jit
def score_kernel(
    mean_text,  # [B, H, D] float32, contiguous
    frame_mean,  # [B, F, H, D] float32
    score,  # [B, F] float32, contiguous
    mean_batch, mean_frame, mean_head,
    scale, heads, frames, head_dim,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """One program: the score of one frame; its products are added in a fixed order."""
    frame, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    dim = tl.arange(0, BLOCK_DIM)[None, :]
    total = tl.zeros([BLOCK_HEADS, BLOCK_DIM], tl.float32)
    for start in range(0, heads, BLOCK_HEADS):
        head = start + tl.arange(0, BLOCK_HEADS)[:, None]
        inside = (head < heads) & (dim < head_dim)
        text = tl.load(mean_text + (batch * heads + head) * head_dim + dim, inside, other=0.0)
        keys = frame_mean + batch * mean_batch + frame * mean_frame + head.to(tl.int64) * mean_head + dim
        total += text * tl.load(keys, inside, other=0.0)
    tl.store(score + batch * frames + frame, tl.sum(tl.sum(total, 1), 0) * (scale / heads))


@triton.jit
def share_kernel(
    lse,  # [B, H, T, F] float32, contiguous
    mask,  # [B, T] bool, contiguous, or None
    score,  # [B, F] float32, contiguous
    heads, tokens, frames,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_FRAMES: tl.constexpr,
):  # fmt: skip
    """One program: the shares of one batch row, averaged over heads and the text tokens that count."""
    batch = tl.program_id(0).to(tl.int64)
    frame = tl.arange(0, BLOCK_FRAMES)
    total = tl.zeros([BLOCK_TOKENS, BLOCK_FRAMES], tl.float32)
    counted = tl.zeros([BLOCK_TOKENS], tl.int32)
    for start in range(0, heads * tokens, BLOCK_TOKENS):
        row = start + tl.arange(0, BLOCK_TOKENS)
        counts = load_tokens(mask, batch, row % tokens, tokens, row < heads * tokens)
        inside = counts[:, None] & (frame < frames)[None, :]
        logits = tl.load(lse + (batch * heads * tokens + row)[:, None] * frames + frame[None, :], inside, float("-inf"))
        top = tl.max(logits, 1)
        mass = tl.exp(logits - tl.where(counts, top, 0.0)[:, None])
        total += tl.where(inside, mass / tl.where(counts, tl.sum(mass, 1), 1.0)[:, None], 0.0)
        counted += counts.to(tl.int32)
    count = tl.maximum(tl.sum(counted, 0), 1)
    tl.store(score + batch * frames + frame, tl.sum(total, 0) / (count * 1.0), frame < frames)


def prompt_relevance_mean(text_key: Tensor, frame_mean: Tensor, text_mask: Tensor | None, scale: float) -> Tensor:
    """text_key [B, T, H, D], frame_mean [B, F, H, D] -> [B, F]: scaled product of the means, averaged over heads."""
    batch, tokens, heads, head_dim = text_key.shape
    frames = frame_mean.shape[1]
    score = frame_mean.new_empty((batch, frames))
    if frames:
        score_kernel[(frames, batch)](
            segment_means(text_key, tokens, text_mask), frame_mean, score,
            *frame_mean.stride()[:3],
            float(scale), heads, frames, head_dim,
            BLOCK_DIM=next_power_of_2(head_dim),
            **config("relevance_score", text_key.device).options,
        )  # fmt: skip
    return score


def prompt_relevance_softmax(
    text_key: Tensor, key: Tensor, text_mask: Tensor | None, tokens_per_frame: int, scale: float
) -> Tensor:
    """text_key [B, T, H, D], key [B, F*N, H, D] -> [B, F]: share of the attention mass on each frame."""
    batch, tokens, heads, _ = text_key.shape
    frames = key.shape[1] // tokens_per_frame
    score = key.new_empty((batch, frames), dtype=torch.float32)
    if frames:
        mask = None if text_mask is None else text_mask.contiguous()
        lse = frame_lse(text_key, key, tokens_per_frame, scale)
        share_kernel[(batch,)](
            lse, mask, score, heads, tokens, frames, **tile_sizes("relevance_share", frames, key.device)
        )
    return score

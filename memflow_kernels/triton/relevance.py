"""prompt_relevance: how much the prompt calls for each remembered frame.

"mean": means of the text tokens that count, then one product per frame. "token": one matrix product over the channels
of all heads. "softmax": every program streams over the keys of one frame and keeps a log-sum-exp per text token; shares
come from those, and no score matrix is ever stored.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import config
from .integers import cdiv, next_power_of_2
from .means import segment_means
from .relevance_backward import prompt_relevance_softmax_backward
from .relevance_tiles import frame_lse, load_tokens, tile_sizes

__all__ = [
    "prompt_relevance_mean",
    "prompt_relevance_softmax",
    "prompt_relevance_softmax_backward",
    "prompt_relevance_token",
]


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
def token_kernel(
    text, frame_mean,  # [B, T, H, D], [B, F, H, D] float32
    mask,  # [B, T] bool, contiguous, or None
    score,  # [B, T, F] float32, contiguous
    text_batch, text_token, text_head,
    mean_batch, mean_frame, mean_head,
    scale, tokens, heads, frames, head_dim,
    BLOCK_TEXT: tl.constexpr,
    BLOCK_FRAMES: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """One program: the scores of BLOCK_TEXT tokens for BLOCK_FRAMES frames."""
    batch = tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * BLOCK_TEXT + tl.arange(0, BLOCK_TEXT)
    frame = tl.program_id(1) * BLOCK_FRAMES + tl.arange(0, BLOCK_FRAMES)
    counts = load_tokens(mask, batch, token, tokens, token < tokens)
    total = tl.zeros([BLOCK_TEXT, BLOCK_FRAMES], tl.float32)
    for head in range(heads):
        texts = text + batch * text_batch + token.to(tl.int64)[:, None] * text_token + head * text_head
        means = frame_mean + batch * mean_batch + frame.to(tl.int64)[:, None] * mean_frame + head * mean_head
        for start in range(0, head_dim, BLOCK_DIM):
            dim = start + tl.arange(0, BLOCK_DIM)
            inside = (dim < head_dim)[None, :]
            rows = tl.load(texts + dim[None, :], counts[:, None] & inside, other=0.0).to(tl.float32)
            columns = tl.load(means + dim[None, :], (frame < frames)[:, None] & inside, other=0.0)
            total = tl.dot(rows, tl.trans(columns), total, input_precision="ieee")
    total = tl.where(counts[:, None], total * (scale / heads), 0.0)  # 0 times a mean that is NaN would be NaN
    out = score + (batch * tokens + token.to(tl.int64)[:, None]) * frames + frame[None, :]
    tl.store(out, total, (token < tokens)[:, None] & (frame < frames)[None, :])


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


def prompt_relevance_token(text_key: Tensor, frame_mean: Tensor, text_mask: Tensor | None, scale: float) -> Tensor:
    """text_key [B, T, H, D], frame_mean [B, F, H, D] -> [B, T, F]: scaled product, averaged over heads."""
    batch, tokens, heads, head_dim = text_key.shape
    frames = frame_mean.shape[1]
    score = frame_mean.new_empty((batch, tokens, frames))
    if frames:
        options = config("relevance_token", text_key.device).options
        options["BLOCK_DIM"] = max(min(options["BLOCK_DIM"], next_power_of_2(head_dim)), 16)  # what a product needs
        token_kernel[(cdiv(tokens, options["BLOCK_TEXT"]), cdiv(frames, options["BLOCK_FRAMES"]), batch)](
            text_key, frame_mean, None if text_mask is None else text_mask.contiguous(), score,
            *text_key.stride()[:3], *frame_mean.stride()[:3],
            float(scale), tokens, heads, frames, head_dim,
            **options,
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

"""Tiles of text tokens against the keys of one frame: what forward and backward of softmax relevance share."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import config
from .integers import cdiv, next_power_of_2


@triton.jit
def load_tokens(mask, batch, token, tokens, inside):
    """Which of the text tokens count: all that are inside, or those of mask [B, T]."""
    if mask is not None:
        inside = inside & (tl.load(mask + batch * tokens + token, inside, other=0) != 0)
    return inside


@triton.jit
def load_rows(states, token, stride, last, head_dim, BLOCK_DIM: tl.constexpr):
    """Rows [BLOCK, BLOCK_DIM] of one head; 0 from token `last` on and outside the head."""
    dim = tl.arange(0, BLOCK_DIM)
    inside = (token < last)[:, None] & (dim < head_dim)[None, :]
    return tl.load(states + token.to(tl.int64)[:, None] * stride + dim[None, :], inside, other=0.0)


@triton.jit
def frame_lse_kernel(
    text, key,  # [B, T, H, D], [B, F*N, H, D]
    lse,  # [B, H, T, F] float32, contiguous
    text_batch, text_token, text_head,
    key_batch, key_token, key_head,
    scale, tokens, heads, frames, tokens_per_frame, head_dim,
    BLOCK_TEXT: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """One program: the log-sum-exp of BLOCK_TEXT tokens of one head over the keys of one frame."""
    frame, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    batch = tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * BLOCK_TEXT + tl.arange(0, BLOCK_TEXT)
    texts = text + batch * text_batch + head.to(tl.int64) * text_head
    keys = key + batch * key_batch + head.to(tl.int64) * key_head
    queries = load_rows(texts, token, text_token, tokens, head_dim, BLOCK_DIM)  # [BLOCK_TEXT, BLOCK_DIM]
    top = tl.full([BLOCK_TEXT], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_TEXT], tl.float32)
    last = (frame + 1) * tokens_per_frame
    for start in range(frame * tokens_per_frame, last, BLOCK_KEYS):
        place = start + tl.arange(0, BLOCK_KEYS)
        columns = load_rows(keys, place, key_token, last, head_dim, BLOCK_DIM)  # [BLOCK_KEYS, BLOCK_DIM]
        logits = tl.dot(queries, tl.trans(columns), input_precision="ieee") * scale
        logits = tl.where((place < last)[None, :], logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        mass = mass * tl.exp(top - new_top) + tl.sum(tl.exp(logits - new_top[:, None]), 1)
        top = new_top
    row = (batch * heads + head) * tokens + token
    tl.store(lse + row * frames + frame, top + tl.log(mass), token < tokens)


def tile_sizes(kernel: str, frames: int, device: torch.device) -> dict[str, int]:
    """Options of a kernel that holds BLOCK_TOKENS rows of all frames: together a tile of BLOCK_TILE numbers."""
    options = config(kernel, device).options
    block = next_power_of_2(frames)
    return {"BLOCK_TOKENS": max(options.pop("BLOCK_TILE") // block, 1), "BLOCK_FRAMES": block, **options}


def dot_sizes(kernel: str, head_dim: int, device: torch.device) -> dict[str, int]:
    """Options of a kernel with products of BLOCK_DIM channels, of which the tensor cores need at least 16.

    The configurations hold up to 128 channels; 256 take twice the warps.
    """
    options = config(kernel, device).options
    options["BLOCK_DIM"] = max(next_power_of_2(head_dim), 16)
    options["num_warps"] *= 2 if head_dim > 128 else 1
    return options


def frame_lse(text_key: Tensor, key: Tensor, tokens_per_frame: int, scale: float) -> Tensor:
    """text_key [B, T, H, D], key [B, F*N, H, D] -> log-sum-exp over each frame, [B, H, T, F] float32."""
    batch, tokens, heads, head_dim = text_key.shape
    frames = key.shape[1] // tokens_per_frame
    lse = key.new_empty((batch, heads, tokens, frames), dtype=torch.float32)
    precision = "float32" if key.dtype == torch.float32 else "half"
    options = dot_sizes(f"relevance_lse_{precision}", head_dim, key.device)
    frame_lse_kernel[(cdiv(tokens, options["BLOCK_TEXT"]), frames * heads, batch)](
        text_key, key, lse,
        *text_key.stride()[:3], *key.stride()[:3],
        float(scale), tokens, heads, frames, tokens_per_frame, head_dim,
        **options,
    )  # fmt: skip
    return lse

"""rotate_keys and rotate_keys_write: one launch turns any number of frames, another their means."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import config
from .integers import cdiv, next_power_of_2
from .rotary import CIRCLE_PER_RADIAN, rotate, turns_of_phase


@triton.jit
def rotate_keys_kernel(
    x, new,  # [B, F*N, H, width]; of new only these channels are written
    places,  # [F] or [B, F]
    x_batch, x_token, x_head,
    new_batch, new_token, new_head,
    places_batch, places_frame,
    tokens_per_frame, heads, width, channels,
    LOG2_THETA: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_ROWS heads of tokens of one frame, all of the same place."""
    frame, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    token = (frame * tokens_per_frame + row // heads).to(tl.int64)[:, None, None]
    head = (row % heads).to(tl.int64)[:, None, None]
    dim = tl.arange(0, BLOCK_DIM)[None, None, :]
    inside = (row < tokens_per_frame * heads)[:, None, None] & (dim < width)
    raw = tl.load(x + batch * x_batch + token * x_token + head * x_head + dim, inside, other=0.0)
    pair = tl.arange(0, BLOCK_DIM // 2)[None, None, :]
    exponent = pair.to(tl.float64) / (channels // 2).to(tl.float64) * LOG2_THETA
    speed = (tl.exp2(-exponent) * CIRCLE_PER_RADIAN).to(tl.int64)
    place = tl.load(places + batch * places_batch + frame * places_frame).to(tl.int64)
    cos, sin = turns_of_phase(place * speed)
    turned = tl.where(dim < channels, rotate(raw.to(tl.float32), cos, sin).to(raw.dtype), raw)
    tl.store(new + batch * new_batch + token * new_token + head * new_head + dim, turned, inside)


def _launch(x: Tensor, new: Tensor, places: Tensor, tokens_per_frame: int, channels: int, theta: float) -> None:
    """x [B, F*N, H, width] turned into the first `width` channels of new, for every frame of `places`."""
    batch, _, heads, width = x.shape
    frames = places.shape[-1]
    if not frames:
        return
    chosen = config("rotation", x.device)
    block_dim = next_power_of_2(width)
    rows = max(chosen.blocks["TILE"] // block_dim, 1)
    grid = (cdiv(tokens_per_frame * heads, rows), frames, batch)
    rotate_keys_kernel[grid](
        x, new, places, *x.stride()[:3], *new.stride()[:3],
        places.stride(0) if places.dim() == 2 else 0, places.stride(-1),
        tokens_per_frame, heads, width, channels,
        LOG2_THETA=math.log2(theta), BLOCK_ROWS=rows, BLOCK_DIM=block_dim, num_warps=chosen.warps,
    )  # fmt: skip


def rotate_keys(key: Tensor, places: Tensor, tokens_per_frame: int, channels: int, theta: float) -> Tensor:
    """key [B, F*N, H, D], places [F] or [B, F] -> a new tensor; the first `channels` of every head turn."""
    new = torch.empty(key.shape, dtype=key.dtype, device=key.device)
    _launch(key, new, places, tokens_per_frame, channels, theta)
    return new


def rotate_keys_write(
    key: Tensor, frame_mean: Tensor, places: Tensor, theta: float, pool_key: Tensor, pool_frame_mean: Tensor
) -> None:
    """key [B, S*N, H, C], frame_mean [B, S, H, D], places [F]: turned into the first F slots of the pool."""
    _launch(key, pool_key, places, key.shape[1] // frame_mean.shape[1], key.shape[3], theta)
    _launch(frame_mean, pool_frame_mean, places, 1, key.shape[3], theta)

"""rotate_keys and rotate_keys_write: keys as they are at place 0, turned to a place on the time axis."""

from __future__ import annotations

import torch
from torch import Tensor

from .rotary import rotate


def turns_in_time(places: Tensor, pairs: int, theta: float, dtype: torch.dtype) -> Tensor:
    """exp(i angle) of each of `places` [..., F]: [..., F, 1, 1, pairs], in the precision of the arithmetic for `dtype`.

    Pair i turns by place * theta^(-i / pairs); angles in float64.
    """
    speed = theta ** (-torch.arange(pairs, dtype=torch.float64, device=places.device) / pairs)
    angle = places.to(torch.float64)[..., None, None, None] * speed
    turns = torch.polar(torch.ones_like(angle), angle)
    return turns if dtype == torch.float64 else turns.to(torch.complex64)


def rotate_keys(key: Tensor, places: Tensor, tokens_per_frame: int, channels: int, theta: float) -> Tensor:
    """key [B, F*N, H, D], places [F] or [B, F] -> a new tensor; the first `channels` of every head turn."""
    new = torch.empty_like(key, memory_format=torch.contiguous_format)
    frames, new_frames = (x.unflatten(1, (-1, tokens_per_frame)) for x in (key, new))
    table = turns_in_time(places, channels // 2, theta, key.dtype)
    new_frames[..., :channels] = rotate(frames[..., :channels], table)
    new[..., channels:] = key[..., channels:]
    return new


def rotate_keys_write(
    key: Tensor, frame_mean: Tensor, places: Tensor, theta: float, pool_key: Tensor, pool_frame_mean: Tensor
) -> None:
    """key [B, S*N, H, C], frame_mean [B, S, H, D], places [F]: turned into the first F slots of the pool.

    All channels of key turn, and as many of the means; of the pool's keys the others stay as they are.
    """
    batch, tokens, _, channels = key.shape
    per_frame, count = tokens // frame_mean.shape[1], places.shape[0]
    table = turns_in_time(places, channels // 2, theta, key.dtype)
    for row in range(batch):  # one at a time: what stands between is small
        states, held = (x[row, : count * per_frame].unflatten(0, (count, per_frame)) for x in (key, pool_key))
        held[..., :channels] = rotate(states, table)
    pool_frame_mean[:, :count] = rotate_keys(frame_mean[:, :count], places, 1, channels, theta)

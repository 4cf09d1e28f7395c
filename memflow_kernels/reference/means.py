"""frame_means: the mean key of every frame, per head."""

import torch
from torch import Tensor

from ..dtypes import statistics_dtype


def frame_means(key: Tensor, tokens_per_frame: int) -> Tensor:
    """key [B, F*N, H, D] -> [B, F, H, D]."""
    wide = statistics_dtype(key.dtype)
    batch, tokens, heads, head_dim = key.shape
    frames = key.view(batch, tokens // tokens_per_frame, tokens_per_frame, heads, head_dim)
    if key.dtype == wide:
        return frames.mean(2)
    if key.device.type == "cpu":  # its mean of 16-bit numbers in float32 is several times slower than of wide ones
        return frames.to(wide).mean(2)
    return frames.mean(2, dtype=wide)


def frame_means_backward(grad: Tensor, tokens_per_frame: int, dtype: torch.dtype) -> Tensor:
    """Every token of a frame bears an equal part of grad [B, F, H, D]."""
    return (grad / tokens_per_frame).to(dtype).repeat_interleave(tokens_per_frame, dim=1)

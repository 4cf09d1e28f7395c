"""The frame pool: where the keys and values of remembered frames live."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .dtypes import statistics_dtype


class Pool(NamedTuple):
    """Keys, values and frame means of the frames that one attention layer holds; slot s owns tokens s*N to (s+1)*N.

    Args:
        key: [B, S*N, H, D], S slots of N tokens per frame; normalised and rotated.
        value: like key.
        frame_mean: [B, S, H, D], the mean key of every slot; float32 (float64 where key is float64).

    Example:
        >>> from memflow_kernels import Pool
        >>> pool = Pool.zeros(1, 15, 24, heads=4, head_dim=32)
        >>> pool.slots, pool.tokens_per_frame
        (15, 24)
    """

    key: Tensor
    value: Tensor
    frame_mean: Tensor

    @classmethod
    def zeros(
        cls,
        batch: int,
        slots: int,
        tokens_per_frame: int,
        heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Pool:
        """A pool of empty slots. In memory a head's tokens follow one another, which attention reads fastest.

        Args:
            batch: B.
            slots: S, frames that fit.
            tokens_per_frame: N.
            heads: H.
            head_dim: D.
            dtype: of key and value.
            device: of all three.
        """
        shape = (batch, heads, slots * tokens_per_frame, head_dim)
        return cls(
            torch.zeros(shape, dtype=dtype, device=device).transpose(1, 2),
            torch.zeros(shape, dtype=dtype, device=device).transpose(1, 2),
            torch.zeros((batch, slots, heads, head_dim), dtype=statistics_dtype(dtype), device=device),
        )

    @property
    def slots(self) -> int:
        """S, the number of frames that fit."""
        return self.frame_mean.shape[1]

    @property
    def tokens_per_frame(self) -> int:
        """N."""
        return self.key.shape[1] // self.frame_mean.shape[1]

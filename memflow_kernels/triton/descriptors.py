"""Tensor descriptors of keys and values, for the bulk copies of Hopper and Blackwell.

They are made on the host and passed by value: a kernel needs no scratch memory for them, and a CUDA graph keeps them.
Along every dimension they give 0 outside the tensor, so that the end of a frame, an empty place (frame -1) and padded
channels need no mask.
"""

from __future__ import annotations

import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


def _aligned(x: Tensor) -> bool:
    """A descriptor needs a base and strides in whole 16 bytes."""
    size = x.element_size()
    return x.data_ptr() % 16 == 0 and all(stride > 0 and stride * size % 16 == 0 for stride in x.stride()[:3])


def _descriptor(x: Tensor, sizes: tuple[int, ...], strides: tuple[int, ...], rows: int) -> TensorDescriptor:
    block = [1] * (len(sizes) - 2) + [rows, max(16, triton.next_power_of_2(sizes[-1]))]
    return TensorDescriptor(x, list(sizes), list(strides), block)


def key_descriptors(
    key: Tensor, value: Tensor, tokens_per_frame: int, rows: int
) -> tuple[TensorDescriptor, ...] | None:
    """Descriptors of tiles of `rows` tokens: of key and value by (batch, head, frame, token), then by (.., token).

    None where key or value [B, F*N, H, D] lie so that they cannot be described.
    """
    if not (_aligned(key) and _aligned(value)):
        return None
    batch, tokens, heads, head_dim = key.shape
    by_frame, by_token = [], []
    for x in (key, value):
        per_batch, per_token, per_head, _ = x.stride()
        frames = (batch, heads, tokens // tokens_per_frame, tokens_per_frame, head_dim)
        frame_strides = (per_batch, per_head, per_token * tokens_per_frame, per_token, 1)
        by_frame.append(_descriptor(x, frames, frame_strides, rows))
        by_token.append(_descriptor(x, (batch, heads, tokens, head_dim), (per_batch, per_head, per_token, 1), rows))
    return (*by_frame, *by_token)

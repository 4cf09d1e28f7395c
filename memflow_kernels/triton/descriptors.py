"""Tensor descriptors of keys and values, for the bulk copies of Hopper and Blackwell.

They are made on the host and passed by value: a kernel needs no scratch memory for them, and a CUDA graph keeps them.
Along every dimension they give 0 outside the tensor, so that the end of a frame, an empty place (frame -1) and padded
channels need no mask.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .integers import next_power_of_2

Sizes = tuple[int, ...]


@functools.lru_cache(maxsize=256)
def _checked(dtype: torch.dtype, sizes: Sizes, strides: Sizes, rows: int) -> dict[str, object]:
    """The fields of a descriptor of tiles of `rows` rows, but for its tensor, which a cache must not keep alive.

    Making one checks its sizes, which takes longer than all the rest of a launch: it is done once per layout.
    """
    block = [1] * (len(sizes) - 2) + [rows, max(16, next_power_of_2(sizes[-1]))]
    sample = torch.empty(0, dtype=dtype, device="meta")
    fields = dict(vars(TensorDescriptor(sample, list(sizes), list(strides), block)))
    del fields["base"]
    return fields


def _descriptor(x: Tensor, sizes: Sizes, strides: Sizes, rows: int) -> TensorDescriptor:
    made = object.__new__(TensorDescriptor)
    vars(made).update(_checked(x.dtype, sizes, strides, rows))
    made.base = x
    return made


@functools.lru_cache(maxsize=256)
def _views(shape: Sizes, strides: Sizes, size: int, tokens_per_frame: int) -> tuple[tuple[Sizes, Sizes], ...] | None:
    """Sizes and strides of [B, F*N, H, D] seen as [B, H, F, N, D] and as [B, H, F*N, D].

    None where the strides are not whole 16 bytes, as a descriptor needs them.
    """
    if not all(stride > 0 and stride * size % 16 == 0 for stride in strides[:3]):
        return None
    batch, tokens, heads, head_dim = shape
    per_batch, per_token, per_head, _ = strides
    frames = (batch, heads, tokens // tokens_per_frame, tokens_per_frame, head_dim)
    frame_strides = (per_batch, per_head, per_token * tokens_per_frame, per_token, 1)
    return (frames, frame_strides), ((batch, heads, tokens, head_dim), (per_batch, per_head, per_token, 1))


def key_descriptors(
    key: Tensor, value: Tensor, tokens_per_frame: int, rows: int
) -> tuple[TensorDescriptor, ...] | None:
    """Descriptors of tiles of `rows` tokens: of key and value by (batch, head, frame, token), then by (.., token).

    None where key or value [B, F*N, H, D] lie so that they cannot be described.
    """
    found = []
    for x in (key, value):
        views = _views(tuple(x.shape), x.stride(), x.element_size(), tokens_per_frame)
        if views is None or x.data_ptr() % 16:
            return None
        found.append([_descriptor(x, *view, rows) for view in views])
    keys, values = found
    return keys[0], values[0], keys[1], values[1]

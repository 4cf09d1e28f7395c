"""Tensor descriptors of keys and values, for the bulk copies of Hopper and Blackwell.

They are made on the host and passed by value: a kernel needs no scratch memory for them, and a CUDA graph keeps them.
Along every dimension they give 0 outside the tensor, so that the end of a frame, an empty place (frame -1) and padded
channels need no mask.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .integers import next_power_of_2
from .layouts import Layout, Sizes, by_frame, by_token, describable


class Form(NamedTuple):
    """A descriptor but for its tensor, which a plan must not keep alive.

    Making a descriptor checks its sizes, which takes longer than all the rest of a launch: it is done once per plan.
    """

    kind: type
    fields: dict[str, object]

    @classmethod
    def made(cls, kind: type, dtype: torch.dtype, view: tuple[Sizes, Sizes], block: Sizes, *rest: object) -> Form:
        """The form of descriptors of class `kind`: view: sizes and strides; rest: what else the class takes."""
        sizes, strides = view
        nothing = torch.empty(0, dtype=dtype, device="meta")
        fields = dict(vars(kind(nothing, list(sizes), list(strides), list(block), *rest)))
        del fields["base"]
        return cls(kind, fields)

    def of(self, x: Tensor) -> object:
        """The descriptor of this form of `x`."""
        made = object.__new__(self.kind)
        made.__dict__.update(self.fields, base=x)
        return made


def key_forms(key: Layout, value: Layout, tokens_per_frame: int, rows: int) -> tuple[Form, ...] | None:
    """Forms of tiles of `rows` tokens: of key and value by (batch, head, frame, token), then by (.., token).

    None where key or value [B, F*N, H, D] lie so that they cannot be described.
    """
    if not (describable(key) and describable(value)):
        return None
    tile = (rows, max(16, next_power_of_2(key.shape[-1])))
    frames = [
        Form.made(TensorDescriptor, x.dtype, by_frame(x, tokens_per_frame), (1, 1, 1, *tile)) for x in (key, value)
    ]
    return *frames, *(Form.made(TensorDescriptor, x.dtype, by_token(x), (1, 1, *tile)) for x in (key, value))

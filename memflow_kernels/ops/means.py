"""frame_means: the mean key of every frame, per head."""

import torch
from torch import Tensor

from ..backends import dispatch
from ..dtypes import statistics_dtype
from ..reference.means import frame_means_backward
from . import _checks
from ._call import call


@torch.library.custom_op("memflow::frame_means", mutates_args=())
def _frame_means(key: Tensor, tokens_per_frame: int) -> Tensor:
    return dispatch("frame_means", key.device)(key, tokens_per_frame)


@_frame_means.register_fake
def _(key: Tensor, tokens_per_frame: int) -> Tensor:
    batch, tokens, heads, head_dim = key.shape
    return key.new_empty((batch, tokens // tokens_per_frame, heads, head_dim), dtype=statistics_dtype(key.dtype))


def _setup_context(ctx, inputs, output):
    key, ctx.tokens_per_frame = inputs
    ctx.dtype = key.dtype


def _backward(ctx, grad):
    return frame_means_backward(grad, ctx.tokens_per_frame, ctx.dtype), None


_frame_means.register_autograd(_backward, setup_context=_setup_context)


def frame_means(key: Tensor, tokens_per_frame: int) -> Tensor:
    """Mean key of every frame, per head.

    key: [B, F*N, H, D], any strides with a dense last dimension; tokens_per_frame: N.
    Returns [B, F, H, D] in float32 (float64 for float64). Differentiable.
    Raises TypeError or ValueError for a wrong dtype or shape.
    """
    _checks.states("key", key, "[B, F*N, H, D]", empty_tokens=True)
    _checks.frame_count("key", key.shape[1], tokens_per_frame)
    return call(_frame_means, "frame_means", key, tokens_per_frame)

"""frame_means: the mean key of every frame, per head."""

from torch import Tensor

from ..dtypes import statistics_dtype
from ..reference.means import frame_means_backward
from . import _checks
from .registration import Registered


def _fake(key, tokens_per_frame):
    batch, tokens, heads, head_dim = key.shape
    return key.new_empty((batch, tokens // tokens_per_frame, heads, head_dim), dtype=statistics_dtype(key.dtype))


def _setup_context(ctx, inputs, output):
    key, ctx.tokens_per_frame = inputs
    ctx.dtype = key.dtype


def _backward(ctx, grad):
    return frame_means_backward(grad, ctx.tokens_per_frame, ctx.dtype), None


_frame_means = Registered("frame_means", _fake, (_setup_context, _backward))


@_checks.once_per_kind
def _check(key: Tensor, tokens_per_frame: int) -> None:
    _checks.states("key", key, "[B, F*N, H, D]", empty_tokens=True)
    _checks.frame_count("key", key.shape[1], tokens_per_frame)


def frame_means(key: Tensor, tokens_per_frame: int) -> Tensor:
    """Mean key of every frame, per head. Differentiable.

    Args:
        key: [B, F*N, H, D], any strides with a dense last dimension; F may be 0.
        tokens_per_frame: N.

    Returns:
        [B, F, H, D] in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: for a wrong dtype or shape.

    Example:
        >>> import torch
        >>> from memflow_kernels import frame_means
        >>> frame_means(torch.ones(1, 12, 2, 16), tokens_per_frame=4).shape
        torch.Size([1, 3, 2, 16])
    """
    _check(key, tokens_per_frame)
    return _frame_means(key, tokens_per_frame)

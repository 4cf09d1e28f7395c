"""merge_attention: attention over the union of two sets of keys, from the attention over each."""

import torch
from torch import Tensor

from ..backends import dispatch
from . import _checks
from ._call import call


@torch.library.custom_op("memflow::merge_attention", mutates_args=())
def _merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    return dispatch("merge_attention", out_a.device)(out_a, lse_a, out_b, lse_b)


@_merge_attention.register_fake
def _(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    return out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)


@torch.library.custom_op("memflow::merge_attention_backward", mutates_args=())
def _merge_attention_backward(
    grad_out: Tensor, grad_lse: Tensor, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    run = dispatch("merge_attention_backward", out_a.device)
    return run(grad_out, grad_lse, out_a, lse_a, out_b, lse_b)


@_merge_attention_backward.register_fake
def _(
    grad_out: Tensor, grad_lse: Tensor, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = [x.new_empty(x.shape) for x in (out_a, lse_a, out_b, lse_b)]
    return grads[0], grads[1], grads[2], grads[3]


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad_out, grad_lse):
    return _merge_attention_backward(grad_out, grad_lse, *ctx.saved_tensors)


_merge_attention.register_autograd(_backward, setup_context=_setup_context)


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Exact attention over the union of two sets of keys, from the attention over each.

    out_a, out_b: [B, Lq, H, D], one dtype; lse_a, lse_b: [B, H, Lq], natural log-sum-exp of the scaled logits, float32
    (float64 for float64); -inf for a set without keys. A key in both sets counts twice.
    Returns (out, lse) of the same shapes and dtypes; out 0 and lse -inf where neither set has a key. Differentiable.
    Raises TypeError or ValueError for wrong dtypes, devices or shapes.
    """
    _checks.states("out_a", out_a, "[B, Lq, H, D]")
    _checks.states("out_b", out_b, "[B, Lq, H, D]")
    _checks.shape("out_b", out_b, tuple(out_a.shape), "[B, Lq, H, D] like out_a")
    _checks.same_kind("out_b", out_b, "out_a", out_a)
    batch, queries, heads, _ = out_a.shape
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        _checks.shape(name, lse, (batch, heads, queries), "[B, H, Lq]")
        _checks.statistics(name, lse, "out_a", out_a)
    return call(_merge_attention, "merge_attention", out_a, lse_a, out_b, lse_b)

"""merge_attention: attention over the union of two sets of keys, from the attention over each."""

from torch import Tensor

from . import _checks
from .registration import Registered


def _fake(out_a, lse_a, out_b, lse_b):
    return out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)


def _fake_backward(grad_out, grad_lse, *parts):
    return tuple(x.new_empty(x.shape) for x in parts)


_merge_attention = Registered("merge_attention", _fake)
Registered("merge_attention_backward", _fake_backward)


@_checks.once_per_kind
def _check(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    _checks.states("out_a", out_a, "[B, Lq, H, D]", empty_tokens=True)
    _checks.states("out_b", out_b, "[B, Lq, H, D]", empty_tokens=True)
    _checks.shape("out_b", out_b, tuple(out_a.shape), "[B, Lq, H, D] like out_a")
    _checks.same_kind("out_b", out_b, "out_a", out_a)
    batch, queries, heads, _ = out_a.shape
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        _checks.shape(name, lse, (batch, heads, queries), "[B, H, Lq]")
        _checks.statistics(name, lse, "out_a", out_a)


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Exact attention over the union of two sets of keys, from the attention over each. Differentiable.

    Args:
        out_a: [B, Lq, H, D], attention over the first set.
        lse_a: [B, H, Lq], natural log-sum-exp of its scaled logits, float32 (float64 for float64). -inf for a set
            without keys, and so is +inf, the mark of flash-attn 2 and vLLM: whatever out_a holds there does not count.
        out_b: like out_a, over the second set; a key in both sets counts twice.
        lse_b: like lse_a.

    Returns:
        (out, lse) of the same shapes and dtypes; out 0 and lse -inf where neither set has a key.

    Raises:
        TypeError, ValueError: for wrong dtypes, devices or shapes.

    Example:
        >>> import torch
        >>> from memflow_kernels import memory_attention, merge_attention
        >>> query, key, value = (torch.randn(1, length, 2, 16) for length in (5, 12, 12))
        >>> options = {"tokens_per_frame": 4, "return_lse": True}
        >>> parts = [memory_attention(query, key[:, s], value[:, s], **options) for s in (slice(4), slice(4, 12))]
        >>> out, lse = merge_attention(*parts[0], *parts[1])
        >>> torch.allclose(out, memory_attention(query, key, value, tokens_per_frame=4), atol=1e-6)
        True
    """
    _check(out_a, lse_a, out_b, lse_b)
    return _merge_attention(out_a, lse_a, out_b, lse_b)

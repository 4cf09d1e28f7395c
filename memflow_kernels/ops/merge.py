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


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Exact attention over the union of two sets of keys, from the attention over each.

    out_a, out_b: [B, Lq, H, D], one dtype; lse_a, lse_b: [B, H, Lq], natural log-sum-exp of the scaled logits, float32
    (float64 for float64); -inf for a set without keys, and so is +inf, the mark of flash-attn 2 and vLLM: whatever the
    result of such a set holds does not count. A key in both sets counts twice.
    Returns (out, lse) of the same shapes and dtypes; out 0 and lse -inf where neither set has a key. Differentiable.
    Raises TypeError or ValueError for wrong dtypes, devices or shapes.
    """
    _checks.states("out_a", out_a, "[B, Lq, H, D]", empty_tokens=True)
    _checks.states("out_b", out_b, "[B, Lq, H, D]", empty_tokens=True)
    _checks.shape("out_b", out_b, tuple(out_a.shape), "[B, Lq, H, D] like out_a")
    _checks.same_kind("out_b", out_b, "out_a", out_a)
    batch, queries, heads, _ = out_a.shape
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        _checks.shape(name, lse, (batch, heads, queries), "[B, H, Lq]")
        _checks.statistics(name, lse, "out_a", out_a)
    return _merge_attention(out_a, lse_a, out_b, lse_b)

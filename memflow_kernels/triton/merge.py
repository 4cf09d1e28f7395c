"""merge_attention: attention over the union of two sets of keys, from that over each; one pass over the rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .integers import cdiv, next_power_of_2


@triton.jit
def _rows(rows_total, queries, heads, ROWS: tl.constexpr):
    """batch row, query and head of this program's rows, in the order of the result, and which of them exist."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token = row // heads
    return token // queries, token % queries, row % heads, row < rows_total


@triton.jit
def _shares(lse_a, lse_b):
    """Share of the mass in each set, 0 where neither has a key, and the log-sum-exp of the union; +inf marks no key."""
    lse_a = tl.where(lse_a == float("inf"), float("-inf"), lse_a)
    lse_b = tl.where(lse_b == float("inf"), float("-inf"), lse_b)
    top = tl.maximum(lse_a, lse_b)
    some = tl.where(top == float("-inf"), 0.0, top)
    mass_a, mass_b = tl.exp(lse_a - some), tl.exp(lse_b - some)
    mass = mass_a + mass_b
    divisor = tl.where(mass == 0, 1.0, mass)
    return mass_a / divisor, mass_b / divisor, some + tl.log(mass)


@triton.jit
def _weighed(states, share):
    """states [ROWS, D] times share [ROWS]; 0 where the share is 0, whatever the states hold there."""
    return tl.where(share[:, None] == 0, 0.0, states * share[:, None])


@triton.jit(do_not_specialize=["rows_total", "queries", "heads"])
def merge_kernel(
    out_a, lse_a, out_b, lse_b, out, lse,
    a_batch, a_query, a_head, b_batch, b_query, b_head,
    lse_a_batch, lse_a_head, lse_a_query, lse_b_batch, lse_b_head, lse_b_query,
    rows_total, queries, heads,
    D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """out [B, Lq, H, D] and lse [B, H, Lq]."""
    batch, query, head, exists = _rows(rows_total, queries, heads, ROWS)
    places_a = batch * lse_a_batch + head * lse_a_head + query * lse_a_query
    places_b = batch * lse_b_batch + head * lse_b_head + query * lse_b_query
    from_a = tl.load(lse_a + places_a, mask=exists, other=0.0)
    from_b = tl.load(lse_b + places_b, mask=exists, other=0.0)
    share_a, share_b, both = _shares(from_a, from_b)
    tl.store(lse + (batch * heads + head) * queries + query, both, mask=exists)

    channel = tl.arange(0, D_PAD)[None, :]
    inside = exists[:, None] & (channel < D)
    rows_a = (batch * a_batch + query * a_query + head * a_head)[:, None] + channel
    rows_b = (batch * b_batch + query * b_query + head * b_head)[:, None] + channel
    a = tl.load(out_a + rows_a, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(out_b + rows_b, mask=inside, other=0.0).to(tl.float32)
    merged = _weighed(a, share_a) + _weighed(b, share_b)
    target = ((batch * queries + query) * heads + head)[:, None] * D + channel
    tl.store(out + target, merged.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows_total", "queries", "heads"])
def merge_backward_kernel(
    grad_out, grad_lse, out_a, lse_a, out_b, lse_b, grad_a, grad_lse_a, grad_b, grad_lse_b,
    rows_total, queries, heads,
    D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """All four gradients; every tensor is contiguous. With shares a and b = 1 - a: d a / d lse_a = a b."""
    batch, query, head, exists = _rows(rows_total, queries, heads, ROWS)
    place = (batch * heads + head) * queries + query
    from_a = tl.load(lse_a + place, mask=exists, other=0.0)
    from_b = tl.load(lse_b + place, mask=exists, other=0.0)
    share_a, share_b, _ = _shares(from_a, from_b)
    through_lse = tl.load(grad_lse + place, mask=exists, other=0.0)

    channel = tl.arange(0, D_PAD)[None, :]
    inside = exists[:, None] & (channel < D)
    rows = ((batch * queries + query) * heads + head)[:, None] * D + channel
    grad = tl.load(grad_out + rows, mask=inside, other=0.0).to(tl.float32)
    a = tl.load(out_a + rows, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(out_b + rows, mask=inside, other=0.0).to(tl.float32)
    both = share_a * share_b
    moved = tl.where(both == 0, 0.0, tl.sum(grad * (a - b), 1) * both)
    tl.store(grad_a + rows, _weighed(grad, share_a).to(grad_a.dtype.element_ty), mask=inside)
    tl.store(grad_b + rows, _weighed(grad, share_b).to(grad_b.dtype.element_ty), mask=inside)
    tl.store(grad_lse_a + place, through_lse * share_a + moved, mask=exists)
    tl.store(grad_lse_b + place, through_lse * share_b - moved, mask=exists)


def _launch(out: Tensor) -> tuple[tuple[int], tuple[int, int, int], dict[str, int]]:
    """Grid, sizes and options for one program per block of rows of [B, Lq, H, D]."""
    batch, queries, heads, head_dim = out.shape
    rows_total = batch * queries * heads
    config = configs.config("merge", out.device)
    grid = (cdiv(rows_total, config.blocks["ROWS"]),)
    dims = {"D": head_dim, "D_PAD": next_power_of_2(head_dim)}
    return grid, (rows_total, queries, heads), {**dims, **config.options}


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """out_* [B, Lq, H, D], lse_* [B, H, Lq] -> out, lse of the same shapes, contiguous."""
    out = torch.empty(out_a.shape, dtype=out_a.dtype, device=out_a.device)
    lse = torch.empty(lse_a.shape, dtype=lse_a.dtype, device=lse_a.device)
    if out.numel() == 0:
        return out, lse
    grid, sizes, options = _launch(out)
    strides = (*out_a.stride()[:3], *out_b.stride()[:3], *lse_a.stride(), *lse_b.stride())
    merge_kernel[grid](out_a, lse_a, out_b, lse_b, out, lse, *strides, *sizes, **options)
    return out, lse


def merge_attention_backward(
    grad_out: Tensor, grad_lse: Tensor, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of out_a, lse_a, out_b, lse_b."""
    inputs = [x.contiguous() for x in (grad_out, grad_lse, out_a, lse_a, out_b, lse_b)]
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (out_a, lse_a, out_b, lse_b)]
    if out_a.numel() == 0:
        return tuple(grads)
    grid, sizes, options = _launch(out_a)
    merge_backward_kernel[grid](*inputs, *grads, *sizes, **options)
    return tuple(grads)

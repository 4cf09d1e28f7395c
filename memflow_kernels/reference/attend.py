"""Attention over one range of keys, and its gradients: torch's fused CPU kernels, or plain products in blocks of keys.

Both directions take part of the keys as well as all of them: the backward needs the log-sum-exp and the result over all
keys, and what it returns for the queries is the part that these keys contribute.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dtypes import statistics_dtype
from .merge import merge_attention

KEYS_PER_BLOCK = 2048  # of the plain forward: its logits are [B, H, Lq, 2048]
LOGITS = 2**21  # of the plain backward that exist at a time
VECTOR = 16  # numbers in the longest register of a CPU
# torch's fused CPU kernel, which reads strided views [B, H, L, D] in place -> out, lse
heads_first = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def nothing(query: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over no key at all: 0, and -inf."""
    out = torch.zeros(query.shape, dtype=query.dtype, device=query.device)
    lse_shape = (query.shape[0], query.shape[2], query.shape[1])
    return out, query.new_full(lse_shape, -torch.inf, dtype=statistics_dtype(query.dtype))


def attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """query [B, Lq, H, D], key and value [B, Lk, H, D], bias [B, H, 1, Lk] -> out [B, Lq, H, D], lse [B, H, Lq]."""
    if 0 in query.shape or 0 in key.shape:
        return nothing(query)
    # Of fewer keys than a register holds torch's kernel takes a row of NaN for one without keys, with a result of 0.
    fused = query.device.type == "cpu" and key.shape[1] >= VECTOR
    if not fused:
        return plain(query, key, value, scale, bias)
    states = (x.transpose(1, 2) for x in (query, key, value))
    out, lse = heads_first(*states, attn_mask=_mask(query, bias), scale=scale)
    return out.transpose(1, 2), lse


def _mask(query: Tensor, bias: Tensor | None) -> Tensor | None:
    """The bias as the fused kernels want it: in the dtype of the query, one row per query."""
    return None if bias is None else bias.to(query.dtype).expand(-1, -1, query.shape[1], -1)


def plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    bias: Tensor | None,
    keys_per_block: int = KEYS_PER_BLOCK,
) -> tuple[Tensor, Tensor]:
    """In plain products, a block of keys at a time, in float32 (float64 for float64)."""
    wide = statistics_dtype(query.dtype)
    scaled = query.transpose(1, 2).to(wide) * scale  # [B, H, Lq, D]
    out = lse = None
    for start in range(0, key.shape[1], keys_per_block):
        block = slice(start, start + keys_per_block)
        logits = scaled @ key[:, block].permute(0, 2, 3, 1).to(wide)  # [B, H, Lq, block]
        if bias is not None:
            logits = logits + bias[..., block]
        top = logits.amax(-1, keepdim=True)
        top = top.masked_fill(top == -torch.inf, 0.0)
        share = torch.exp(logits - top)
        mass = share.sum(-1, keepdim=True)
        share = share / mass.masked_fill(mass == 0, 1.0)
        block_out = (share @ value[:, block].transpose(1, 2).to(wide)).transpose(1, 2)
        block_lse = (top + mass.log()).squeeze(-1)
        if out is None:
            out, lse = block_out, block_lse
        else:
            out, lse = merge_attention(out, lse, block_out, block_lse)
    return out.to(query.dtype), lse


def attend_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients [B, L, H, D] of query (through these keys), key and value; out and lse are those over all keys.

    A query without any key has lse +inf, which makes all its shares 0. grad_lse None: nothing came through lse.
    """
    if 0 in query.shape or 0 in key.shape:
        return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    if grad_lse is not None or query.device.type != "cpu":
        return plain_backward(grad_out, grad_lse, query, key, value, out, lse, scale, bias)
    states = (x.transpose(1, 2) for x in (grad_out, query, key, value, out))
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default(
        *states, lse, 0.0, False, attn_mask=_mask(query, bias), scale=scale
    )
    return tuple([grad.transpose(1, 2) for grad in grads])


def plain_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    bias: Tensor | None,
    logits_at_a_time: int = LOGITS,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in plain products. With p = exp(logit - lse): d logit = p (<dO, v> - <dO, O> + d lse)."""
    wide = statistics_dtype(query.dtype)
    queries, grads, outs = (x.transpose(1, 2).to(wide) for x in (query, grad_out, out))  # [B, H, Lq, D]
    offset = (grads * outs).sum(-1)
    offset = (offset if grad_lse is None else offset - grad_lse).unsqueeze(-1)  # [B, H, Lq, 1]
    grad_query = torch.zeros_like(queries)
    grad_key = torch.empty(key.shape, dtype=key.dtype, device=key.device)
    grad_value = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    keys_per_block = max(logits_at_a_time // max(lse.numel(), 1), 16)
    for start in range(0, key.shape[1], keys_per_block):
        block = slice(start, start + keys_per_block)
        keys, values = (x[:, block].transpose(1, 2).to(wide) for x in (key, value))  # [B, H, block, D]
        logits = queries @ keys.mT * scale  # [B, H, Lq, block]
        if bias is not None:
            logits += bias[..., block]
        share = logits.sub_(lse.unsqueeze(-1)).exp_()
        grad_value[:, block] = (share.mT @ grads).transpose(1, 2)
        grad_logits = (grads @ values.mT).sub_(offset).mul_(share).mul_(scale)
        grad_query += grad_logits @ keys
        grad_key[:, block] = (grad_logits.mT @ queries).transpose(1, 2)
    return grad_query.transpose(1, 2).to(query.dtype), grad_key, grad_value

"""memory_attention: exact attention over the frames a head chose and over the frames always attended to."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dtypes import statistics_dtype
from .attend import attend, attend_backward, nothing
from .merge import merge_attention
from .shown import Part, Sums, shown


def _attend_parts(query: Tensor, key: Tensor, value: Tensor, parts: list[Part], scale: float) -> tuple[Tensor, Tensor]:
    """The parts one by one, merged by their mass; more than two in float32, so that they are rounded once."""
    if not parts:
        return nothing(query)
    out, lse = attend(query, parts[0].of(key), parts[0].of(value), scale, parts[0].bias)
    if parts[0].bias is not None:
        lse = lse.masked_fill((parts[0].bias == -torch.inf).all(-1), -torch.inf)
    if len(parts) > 2:
        out = out.to(statistics_dtype(query.dtype))
    for part in parts[1:]:
        out, lse = merge_attention(out, lse, *attend(query, part.of(key), part.of(value), scale, part.bias))
    return out.to(query.dtype), lse


def memory_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    frame_table: Tensor | None,
    tokens_per_frame: int,
    candidate_frames: int,
    scale: float,
    query_block: int | None,
) -> tuple[Tensor, Tensor]:
    """query [B, Lq, H, D], key and value [B, F*N, H, D], frame_table [B, H, n] -> out [B, Lq, H, D], lse [B, H, Lq].

    With query_block the table is [B, H, blocks, n].
    Without a table every frame is attended to, by one call on the views. With one, the frames from candidate_frames on
    are attended to where they lie, and so are chosen frames if all heads chose the same; what each head chose for
    itself is gathered. The parts are merged by their mass.
    """
    if frame_table is None:
        out, lse = attend(query, key, value, scale)
        return out.contiguous(), lse.contiguous()
    ranges = shown(query, frame_table, tokens_per_frame, candidate_frames, key.shape[1], query_block)
    results = [_attend_parts(query[:, rows], key, value, parts, scale) for rows, parts in ranges]
    if not results:  # no queries
        results = [nothing(query)]
    outs, lses = zip(*results, strict=True)
    out, lse = (outs[0], lses[0]) if len(outs) == 1 else (torch.cat(outs, 1), torch.cat(lses, 2))
    return out.contiguous(), lse.contiguous()


def memory_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    frame_table: Tensor | None,
    tokens_per_frame: int,
    candidate_frames: int,
    scale: float,
    query_block: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; the choice of frames counts as constant. grad_lse None: none came that way.

    Only frames that a head chose are read for it, part by part as in the forward; every sum has one order.
    """
    if frame_table is None:
        grads = attend_backward(grad_out, grad_lse, query, key, value, out, lse, scale)
        return tuple([grad.contiguous() for grad in grads])
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    wide = statistics_dtype(query.dtype)
    ranges = shown(query, frame_table, tokens_per_frame, candidate_frames, key.shape[1], query_block)
    # keys that several ranges of queries see gather sums, which are rounded once
    grad_key, grad_value = (Sums(x, key.dtype if len(ranges) == 1 else wide) for x in (key, value))
    grad_queries = []
    for rows, parts in ranges:
        through_lse = None if grad_lse is None else grad_lse[:, :, rows]
        before = (grad_out[:, rows], through_lse, query[:, rows])
        after = (out[:, rows], lse[:, :, rows], scale)
        grad_query = None
        for part in reversed(parts):  # what is always attended to first: it need not be added to zeros
            grads = attend_backward(*before, part.of(key), part.of(value), *after, part.bias)
            grad_query = grads[0].to(wide) if grad_query is None else grad_query.add_(grads[0])
            grad_key.add(part, grads[1])
            grad_value.add(part, grads[2])
            del grads  # before the next part has its own
        grad_queries.append(torch.zeros_like(query[:, rows]) if grad_query is None else grad_query.to(query.dtype))
    grad_query = torch.zeros_like(query) if not grad_queries else grad_queries[0]
    if len(grad_queries) > 1:
        grad_query = torch.cat(grad_queries, 1)
    return grad_query.contiguous(), grad_key.result(key.dtype), grad_value.result(value.dtype)

"""memory_attention: exact attention over the frames a head chose and over the frames always attended to."""

import torch
from torch import Tensor

from ..dtypes import statistics_dtype
from . import _checks
from .means import frame_means
from .registration import Registered
from .selection import select_frames


def _fake(query, *arguments):
    batch, queries, heads, _ = query.shape
    lse = query.new_empty((batch, heads, queries), dtype=statistics_dtype(query.dtype))
    return query.new_empty(query.shape), lse


def _fake_backward(grad_out, grad_lse, query, key, value, *rest):
    return tuple(x.new_empty(x.shape) for x in (query, key, value))


_memory_attention = Registered("memory_attention", _fake)
Registered("memory_attention_backward", _fake_backward)


@_checks.once_per_kind
def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tokens_per_frame: int,
    candidate_frames: int,
    top_k: int | None,
    frame_table: Tensor | None,
    frame_mean: Tensor | None,
    query_mean: Tensor | None,
    query_block: int | None,
    scale: float | None,
) -> None:
    _checks.states("query", query, "[B, Lq, H, D]", empty_tokens=True)
    batch, queries, heads, head_dim = query.shape
    for name, x in (("key", key), ("value", value)):
        _checks.states(name, x, "[B, F*N, H, D]", empty_tokens=True)
        _checks.shape(name, x, (batch, key.shape[1], heads, head_dim), "[B, F*N, H, D]")
        _checks.same_kind(name, x, "query", query)
    frames = _checks.frame_count("key", key.shape[1], tokens_per_frame)
    _checks.scale(scale, head_dim)
    _checks.integer("candidate_frames", candidate_frames, 0)
    if candidate_frames > frames:
        raise ValueError(f"candidate_frames must be at most the {frames} frames of key, got {candidate_frames}")
    if top_k is not None:
        _checks.integer("top_k", top_k, 1)
    if query_block is not None:
        _checks.integer("query_block", query_block, 1)
    if frame_table is not None:
        if top_k is not None:
            raise ValueError(f"frame_table replaces the choice: top_k must be None with it, got {top_k}")
        _checks.of_dtype("frame_table", frame_table, torch.int32)
        places = frame_table.shape[-1] if frame_table.dim() else 0
        if query_block is None:
            _checks.shape("frame_table", frame_table, (batch, heads, places), "[B, H, n]")
        else:
            needed = (batch, heads, _checks.block_count(queries, query_block), places)
            _checks.shape("frame_table", frame_table, needed, "[B, H, blocks of query_block queries, n]")
        _checks.same_device("frame_table", frame_table, "query", query)
    if frame_mean is not None:
        _checks.states("frame_mean", frame_mean, "[B, candidate_frames, H, D]", empty_tokens=True)
        needed = (batch, candidate_frames, heads, head_dim)
        _checks.shape("frame_mean", frame_mean, needed, "[B, candidate_frames, H, D]")
        _checks.statistics("frame_mean", frame_mean, "query", query)
    if query_mean is not None:
        _checks.shape("query_mean", query_mean, (batch, heads, head_dim), "[B, H, D]")
        _checks.statistics("query_mean", query_mean, "query", query)
        if query_block is not None:
            raise ValueError(f"query_mean is one mean for all queries: query_block must be None, got {query_block}")


def memory_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    tokens_per_frame: int,
    candidate_frames: int = 0,
    top_k: int | None = None,
    frame_table: Tensor | None = None,
    frame_mean: Tensor | None = None,
    query_mean: Tensor | None = None,
    query_block: int | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention in which every head attends to its own choice of the candidate frames and to all later frames.

    query: [B, Lq, H, D]; key, value: [B, F*N, H, D]; any strides with a dense last dimension, one dtype.
    tokens_per_frame: N. candidate_frames: the first that many frames of key compete for top_k places per batch row and
    head, by <mean query, mean frame key> (see select_frames); later frames are always attended to.
    top_k: at least 1; None, or at least candidate_frames, keeps all candidates (dense attention).
    frame_table: [B, H, n] int32, candidates per head in place of the choice; -1 = empty place, a frame named
    twice counts twice.
    frame_mean: [B, candidate_frames, H, D] float32 (float64 for float64), the candidates' means where known.
    query_mean: [B, H, D] float32 (float64 for float64), the mean query where known (qk_norm_rope_write returns it).
    query_block: at least 1; every block of that many queries has a choice of its own (the last block may be shorter),
    and frame_table is [B, H, ceil(Lq / query_block), n]. None: one choice for all queries, as published.
    scale: D^-1/2 by default.

    Returns out [B, Lq, H, D] in the dtype of query, exact over the chosen keys; with return_lse also lse [B, H, Lq],
    the natural log-sum-exp of the scaled logits, float32 (float64 for float64). A head without any key gives out 0 and
    lse -inf, and so does an empty memory; Lq and F may be 0. Differentiable in query, key and value, through out and
    lse; the choice itself is not differentiated.
    Forward and backward are deterministic. Source: arXiv 2512.14699, equations 2 to 4.
    Raises TypeError or ValueError for wrong dtypes, devices, shapes or sizes, and on the CPU for a table value outside
    -1 to candidate_frames - 1 (on a GPU the table is not read on the host).
    """
    frames = (tokens_per_frame, candidate_frames, top_k, frame_table, frame_mean, query_mean, query_block)
    _check(query, key, value, *frames, scale)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)

    if top_k is not None and top_k < candidate_frames and query.shape[1]:  # no queries choose nothing
        if frame_mean is None:
            frame_mean = frame_means(key[:, : candidate_frames * tokens_per_frame].detach(), tokens_per_frame)
        choosing = query if query_mean is None else query_mean.unsqueeze(1)
        frame_table = select_frames(choosing, frame_mean, top_k, query_block=query_block)
    sizes = (tokens_per_frame, candidate_frames, scale, query_block)
    out, lse = _memory_attention(query, key, value, frame_table, *sizes)
    return (out, lse) if return_lse else out

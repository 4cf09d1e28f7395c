"""select_frames: the candidate frames that each head attends to."""

import torch
from torch import Tensor

from . import _checks
from .registration import Registered


def _fake(query, frame_mean, top_k, valid, query_block):
    batch, queries, heads, _ = query.shape
    blocks = () if query_block is None else (_checks.block_count(queries, query_block),)
    return query.new_empty((batch, heads, *blocks, min(top_k, frame_mean.shape[1])), dtype=torch.int32)


_select_frames = Registered("select_frames", _fake)


@_checks.once_per_kind
def _check(query: Tensor, frame_mean: Tensor, top_k: int, valid: Tensor | None, query_block: int | None) -> None:
    _checks.states("query", query, "[B, Lq, H, D]")
    _checks.states("frame_mean", frame_mean, "[B, F, H, D]", empty_tokens=True)
    batch, _, heads, head_dim = query.shape
    frames = frame_mean.shape[1]
    _checks.shape("frame_mean", frame_mean, (batch, frames, heads, head_dim), "[B, F, H, D]")
    _checks.statistics("frame_mean", frame_mean, "query", query)
    _checks.integer("top_k", top_k, 1)
    if query_block is not None:
        _checks.integer("query_block", query_block, 1)
    if valid is not None:
        _checks.of_dtype("valid", valid, torch.bool)
        _checks.shape("valid", valid, (batch, frames), "[B, F]")
        _checks.same_device("valid", valid, "query", query)


def select_frames(
    query: Tensor, frame_mean: Tensor, top_k: int, *, valid: Tensor | None = None, query_block: int | None = None
) -> Tensor:
    """The top_k candidate frames of every head, by <mean query, mean frame key>, unscaled.

    Of equal scores the lower index is chosen. The choice has no gradient.

    Args:
        query: [B, Lq, H, D], all of whose tokens are averaged.
        frame_mean: [B, F, H, D], the candidates' mean keys; float32 (float64 for float64).
        top_k: at least 1.
        valid: [B, F] bool, True where a frame may be chosen; all of them by default.
        query_block: at least 1; every block of that many queries chooses for itself, by its own mean (the last block
            may be shorter). None: one choice for all queries, as published.

    Returns:
        [B, H, k] int32, k = min(top_k, F), in ascending order; with query_block [B, H, ceil(Lq / query_block), k].
        Places that no valid frame fills are -1, at the end.

    Raises:
        TypeError, ValueError: for wrong dtypes, devices or shapes, top_k < 1 or query_block < 1.

    Source: arXiv 2512.14699, equations 2 to 4, per head.

    Example:
        >>> import torch
        >>> from memflow_kernels import select_frames
        >>> query = torch.ones(1, 5, 1, 4)
        >>> frame_mean = torch.tensor([0.1, 0.4, 0.3]).view(1, 3, 1, 1).repeat(1, 1, 1, 4)
        >>> select_frames(query, frame_mean, top_k=2)
        tensor([[[1, 2]]], dtype=torch.int32)
    """
    _check(query, frame_mean, top_k, valid, query_block)
    return _select_frames(query.detach(), frame_mean.detach(), top_k, valid, query_block)

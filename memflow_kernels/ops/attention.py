"""memory_attention: exact attention over the frames a head chose and over the frames always attended to."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from ..dtypes import statistics_dtype
from . import _checks
from .means import _frame_means
from .registration import Registered, derived
from .selection import _select_frames

Layout = Literal["blhd", "bhld"]


def _fake(query, *arguments):
    batch, queries, heads, _ = query.shape
    lse = query.new_empty((batch, heads, queries), dtype=statistics_dtype(query.dtype))
    return query.new_empty(query.shape), lse


def _fake_backward(grad_out, grad_lse, query, key, value, *rest):
    return tuple(x.new_empty(x.shape) for x in (query, key, value))


def _fake_top_k(query, key, value, frame_mean, query_mean, tokens_per_frame, candidate_frames, top_k, scale, block):
    blocks = () if block is None else (_checks.block_count(query.shape[1], block),)
    places = (query.shape[0], query.shape[2], *blocks, min(top_k, candidate_frames))
    return *_fake(query), query.new_empty(places, dtype=torch.int32)


_memory_attention = Registered("memory_attention", _fake)
_memory_attention_top_k = Registered(
    "memory_attention_top_k", _fake_top_k, derived("memory_attention_top_k", "memory_attention_backward")
)
Registered("memory_attention_backward", _fake_backward)


def _hint(query: Tensor, key: Tensor, tokens_per_frame: int, layout: str) -> str:
    """What else may be meant where heads or tokens do not fit. Not asked where they do: under torch.compile and
    torch.export its conditions would become conditions of the graph."""
    if layout == "bhld":
        return ""
    if query.shape[1] and key.shape[1] and query.shape[1] % key.shape[1] == 0 and key.shape[2] % tokens_per_frame == 0:
        return "; if they are [B, H, L, D], as torch's scaled_dot_product_attention takes them, say layout='bhld'"
    return ""


@_checks.once_per_kind
def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tokens_per_frame: int,
    candidate_frames: int | None,
    top_k: int | None,
    frame_table: Tensor | None,
    frame_mean: Tensor | None,
    query_mean: Tensor | None,
    query_block: int | None,
    scale: float | None,
    layout: str,
) -> None:
    _checks.states("query", query, "[B, Lq, H, D]", empty_tokens=True)
    _checks.states("key", key, "[B, F*N, H, D]", empty_tokens=True)
    _checks.integer("tokens_per_frame", tokens_per_frame, 1)
    batch, queries, heads, head_dim = query.shape
    key_heads = key.shape[2]
    if heads % key_heads:
        hint = _hint(query, key, tokens_per_frame, layout)
        raise ValueError(f"query has {heads} heads, not a multiple of the {key_heads} heads of key{hint}")
    if key.shape[1] % tokens_per_frame:
        hint = _hint(query, key, tokens_per_frame, layout)
        raise ValueError(
            f"key has {key.shape[1]} tokens, not a multiple of tokens_per_frame = {tokens_per_frame}{hint}"
        )
    for name, x in (("key", key), ("value", value)):
        _checks.states(name, x, "[B, F*N, H, D]", empty_tokens=True)
        _checks.shape(name, x, (batch, key.shape[1], key_heads, head_dim), "[B, F*N, H, D]")
        _checks.same_kind(name, x, "query", query)
    frames = key.shape[1] // tokens_per_frame
    _checks.scale(scale, head_dim)
    without_candidates = candidate_frames is None
    candidate_frames = 0 if without_candidates else candidate_frames
    _checks.integer("candidate_frames", candidate_frames, 0)
    if candidate_frames > frames:
        raise ValueError(f"candidate_frames must be at most the {frames} frames of key, got {candidate_frames}")
    if top_k is not None:
        _checks.integer("top_k", top_k, 1)
        if without_candidates and frame_table is None:
            raise ValueError(f"top_k = {top_k} needs candidate_frames: how many of the first {frames} it chooses among")
    if query_block is not None:
        _checks.integer("query_block", query_block, 1)
        if top_k is None and frame_table is None:
            raise ValueError(
                f"query_block = {query_block} is for blocks of queries with a choice of their own: it needs top_k or "
                "frame_table, got neither"
            )
        if heads != key_heads and queries % query_block:
            raise ValueError(
                f"query_block must divide the {queries} queries where key has fewer heads than query, got {query_block}"
            )
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
    for name, known in (("frame_mean", frame_mean), ("query_mean", query_mean)):
        if known is not None and top_k is None:
            raise ValueError(f"{name} is what heads choose frames by: it needs top_k, got top_k=None")
    if frame_mean is not None:
        _checks.states("frame_mean", frame_mean, "[B, candidate_frames, H, D]", empty_tokens=True)
        needed = (batch, candidate_frames, key_heads, head_dim)
        _checks.shape("frame_mean", frame_mean, needed, "[B, candidate_frames, H, D]")
        _checks.statistics("frame_mean", frame_mean, "query", query)
    if query_mean is not None:
        _checks.shape("query_mean", query_mean, (batch, heads, head_dim), "[B, H, D]")
        _checks.statistics("query_mean", query_mean, "query", query)
        if query_block is not None:
            raise ValueError(f"query_mean is one mean for all queries: query_block must be None, got {query_block}")


def _autocast(*states: Tensor) -> tuple[Tensor, ...]:
    """As torch's attention under torch.autocast: all in its format, float64 as it is."""
    dtype = torch.get_autocast_dtype(states[0].device.type)
    return tuple(
        x.to(dtype) if isinstance(x, Tensor) and x.dtype in (torch.float32, torch.bfloat16, torch.float16) else x
        for x in states
    )


def _choose(
    query: Tensor,
    key: Tensor,
    frame_mean: Tensor | None,
    query_mean: Tensor | None,
    tokens_per_frame: int,
    candidate_frames: int,
    top_k: int,
    query_block: int | None,
) -> Tensor:
    """The table of frames where several query heads share a key head."""
    key, query = key.detach(), query.detach()
    if frame_mean is None:
        frame_mean = _frame_means(key[:, : candidate_frames * tokens_per_frame], tokens_per_frame)
    frame_mean = frame_mean.detach().repeat_interleave(query.shape[2] // key.shape[2], 2)
    choosing = query if query_mean is None else query_mean.detach().unsqueeze(1)
    return _select_frames(choosing, frame_mean, top_k, None, query_block)


def _grouped(query: Tensor, key: Tensor, value: Tensor, frame_table: Tensor | None, sizes: tuple, block: int | None):
    """Attention with fewer key heads than query heads: the queries of the heads that share keys follow one another as
    queries of one head, so that no key is copied; each head's queries are blocks with a table of their own."""
    groups = query.shape[2] // key.shape[2]
    queries = query.shape[1]
    folded = query.unflatten(2, (-1, groups)).permute(0, 3, 1, 2, 4).flatten(1, 2)  # [B, groups * Lq, key heads, D]
    if frame_table is not None:
        frame_table = frame_table if block is not None else frame_table.unsqueeze(2)
        frame_table = frame_table.unflatten(1, (-1, groups)).flatten(2, 3)
        block = block or queries
    out, lse = _memory_attention(folded, key, value, frame_table, *sizes, block)
    out = out.unflatten(1, (groups, queries)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    return out, lse.unflatten(2, (groups, queries)).flatten(1, 2)


@overload
def memory_attention(
    query: Tensor, key: Tensor, value: Tensor, *, tokens_per_frame: int, candidate_frames: int | None = ...,
    top_k: int | None = ..., frame_table: Tensor | None = ..., frame_mean: Tensor | None = ...,
    query_mean: Tensor | None = ..., query_block: int | None = ..., scale: float | None = ..., layout: Layout = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip


@overload
def memory_attention(
    query: Tensor, key: Tensor, value: Tensor, *, tokens_per_frame: int, candidate_frames: int | None = ...,
    top_k: int | None = ..., frame_table: Tensor | None = ..., frame_mean: Tensor | None = ...,
    query_mean: Tensor | None = ..., query_block: int | None = ..., scale: float | None = ..., layout: Layout = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def memory_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    tokens_per_frame: int,
    candidate_frames: int | None = None,
    top_k: int | None = None,
    frame_table: Tensor | None = None,
    frame_mean: Tensor | None = None,
    query_mean: Tensor | None = None,
    query_block: int | None = None,
    scale: float | None = None,
    layout: Layout = "blhd",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention in which every head attends to its own choice of the candidate frames and to all later frames.

    Exact over the chosen keys. Differentiable in query, key and value, through out and lse; the choice itself is not
    differentiated. Forward and backward are deterministic. Under torch.autocast query, key and value are taken in its
    format, as torch's own attention does.

    Args:
        query: [B, Lq, H, D], any strides with a dense last dimension; float32, bfloat16, float16 or float64.
            Lq may be 0.
        key: [B, F*N, H, D] in the dtype of query, F frames of N tokens; F may be 0. It may have fewer heads than query,
            of which H must be a multiple: query heads h*G to h*G + G - 1 then share key head h.
        value: like key.
        tokens_per_frame: N.
        candidate_frames: the first that many frames of key compete for top_k places per batch row and head, by
            <mean query, mean frame key> (see select_frames); later frames are always attended to. Needed with top_k;
            may be 0.
        top_k: at least 1; None, or at least candidate_frames, keeps all candidates (dense
            attention).
        frame_table: [B, H, n] int32, candidates per head in place of the choice; -1 = empty place, a frame named twice
            counts twice. Batch rows of different length: candidate_frames = F, and every row names its own frames.
            (A number of keys per row that is not whole frames is not served: a kernel reads frames as they lie.)
        frame_mean: [B, candidate_frames, H, D] with the heads of key, the candidates' means where known; float32
            (float64 for float64). Like query_mean for a choice only, so with top_k.
        query_mean: [B, H, D], the mean query where known (qk_norm_rope_write returns it); float32 (float64 for
            float64).
        query_block: at least 1; every block of that many queries has a choice of its own (the last block may be
            shorter), and frame_table is [B, H, ceil(Lq / query_block), n]. None: one choice for all queries, as
            published.
        scale: of the logits; D^-1/2 by default.
        layout: "blhd", or "bhld" where query, key and value are [B, H, L, D]; out then is too.
        return_lse: also return the log-sum-exp.

    Returns:
        out [B, Lq, H, D] in the dtype of query; with return_lse (out, lse), lse [B, H, Lq] the natural log-sum-exp of
        the scaled logits, float32 (float64 for float64). A head without any key gives out 0 and lse -inf.

    Raises:
        TypeError, ValueError: for wrong dtypes, devices, shapes or sizes, and on the CPU for a table value outside -1
            to candidate_frames - 1 (on a GPU the table is not read on the host).

    Source: arXiv 2512.14699, equations 2 to 4.

    Example:
        >>> import torch
        >>> from memflow_kernels import memory_attention
        >>> query, key, value = (torch.randn(1, length, 2, 16) for length in (8, 24, 24))  # 6 frames of 4 tokens
        >>> memory_attention(query, key, value, tokens_per_frame=4, candidate_frames=4, top_k=2).shape
        torch.Size([1, 8, 2, 16])
        >>> _, lse = memory_attention(query, key, value, tokens_per_frame=4, return_lse=True)
        >>> lse.shape
        torch.Size([1, 2, 8])
    """
    if layout != "blhd":
        if layout != "bhld":
            raise ValueError(f"layout must be 'blhd' or 'bhld', got {layout!r}")
        query, key, value = (
            x.transpose(1, 2) if isinstance(x, Tensor) and x.dim() == 4 else x for x in (query, key, value)
        )
    if isinstance(query, Tensor) and not query.is_meta and torch.is_autocast_enabled(query.device.type):
        query, key, value = _autocast(query, key, value)
    frames = (tokens_per_frame, candidate_frames, top_k, frame_table, frame_mean, query_mean, query_block)
    _check(query, key, value, *frames, scale, layout)
    candidate_frames = candidate_frames or 0
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)

    chooses = top_k is not None and top_k < candidate_frames and query.shape[1]  # no queries choose nothing
    sizes = (tokens_per_frame, candidate_frames, scale)
    if query.shape[2] != key.shape[2]:
        if chooses:
            choice = (frame_mean, query_mean, tokens_per_frame, candidate_frames, top_k, query_block)
            frame_table = _choose(query, key, *choice)
        out, lse = _grouped(query, key, value, frame_table, sizes, query_block)
    elif chooses:
        if frame_mean is not None and frame_mean.requires_grad:
            frame_mean = frame_mean.detach()
        if query_mean is not None and query_mean.requires_grad:
            query_mean = query_mean.detach()
        known = (frame_mean, query_mean, tokens_per_frame, candidate_frames, top_k, scale, query_block)
        out, lse, _ = _memory_attention_top_k(query, key, value, *known)
    else:
        out, lse = _memory_attention(query, key, value, frame_table, *sizes, query_block)
    out = out if layout == "blhd" else out.transpose(1, 2)
    return (out, lse) if return_lse else out

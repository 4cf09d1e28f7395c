"""What is right: the results in float64, in the plainest form, for some of the queries of the full-size problem.

Attention takes every query by itself, so that a sample of them, over all heads and batch rows, checks a full-size
result at a cost that a CPU can bear; the choice of frames is made from all queries, as it must be.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memflow_kernels.reference import rms_norm, rotate_3d

from .states import EPS, AttentionState, LayerState

ROWS = 32  # queries that are checked


def sample_rows(queries: int) -> Tensor:
    """Which queries are checked: spread over all tokens, first and last among them."""
    return torch.linspace(0, queries - 1, min(ROWS, queries), dtype=torch.float64).round().long().unique()


def choose(query: Tensor, key: Tensor, tokens: int, candidates: int, top_k: int | None) -> Tensor:
    """[B, H, F] bool: frames that each head attends to; query [B, Lq, H, D], key [B, F*N, H, D] in float64."""
    frames = key.unflatten(1, (-1, tokens))
    seen = torch.ones((key.shape[0], key.shape[2], frames.shape[1]), dtype=torch.bool, device=key.device)
    if top_k is not None and top_k < candidates:
        score = torch.einsum("bhd,bfhd->bhf", query.mean(1), frames[:, :candidates].mean(2))
        seen[..., :candidates] = False
        seen.scatter_(2, score.topk(top_k, dim=-1).indices, True)
    return seen


def attend_rows(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, tokens: int) -> Tensor:
    """query [B, rows, H, D] -> [B, rows, H, D] over the frames of `seen` [B, H, F], one head at a time."""
    out = torch.empty_like(query)
    for row in range(query.shape[0]):
        for head in range(query.shape[2]):
            mask = seen[row, head].repeat_interleave(tokens)
            logits = query[row, :, head] @ key[row, mask, head].T * query.shape[-1] ** -0.5
            out[row, :, head] = logits.softmax(-1) @ value[row, mask, head]
    return out


def attention_rows(state: AttentionState) -> Tensor:
    """[B, rows, H, D] float64."""
    case = state.case
    query, key, value = (x.double() for x in (state.query, state.key, state.value))
    seen = choose(query, key, case.tokens, case.candidates, state.top_k)
    return attend_rows(query[:, sample_rows(case.queries)], key, value, seen, case.tokens)


def normed_and_rotated(state: LayerState) -> tuple[Tensor, Tensor]:
    """Query and key [B, Lq, H, D] float64 of the chunk."""
    case = state.case
    pairs = ((state.query, state.weight_q), (state.key, state.weight_k))
    normed = (rms_norm(x.double(), weight.double(), EPS).unflatten(2, (case.heads, -1)) for x, weight in pairs)
    return tuple(rotate_3d(x, case.grid, state.start_frame) for x in normed)


def layer_rows(state: LayerState, updated: bool = False) -> Tensor:
    """The chunk's attention over bank, sink and window, [B, rows, H, D] float64; `updated`: after the bank's update."""
    case = state.case
    query, new_key = normed_and_rotated(state)
    new_value = state.value.double().unflatten(2, (case.heads, -1))
    key, value = held_for_chunk(state, updated)
    key, value = torch.cat([key, new_key], dim=1), torch.cat([value, new_value], dim=1)
    candidates = case.candidates * case.tokens // case.block
    seen = choose(query, key, case.block, candidates, state.top_k)
    return attend_rows(query[:, sample_rows(case.queries)], key, value, seen, case.block)


def held_for_chunk(state: LayerState, updated: bool) -> tuple[Tensor, Tensor]:
    """K and V [B, tokens, H, D] float64 of bank, sink and what is left of the window when the chunk has its place."""
    case = state.case
    parts = []
    banks = updated_bank(state) if updated else (x[:, : case.bank].double() for x in (state.held_key, state.held_value))
    for held, bank in zip((state.held_key, state.held_value), banks, strict=True):
        held = held.double()
        sink, window = held[:, case.bank : case.candidates], held[:, case.candidates + case.chunk :]
        parts.append(torch.cat([bank, sink, window], dim=1).flatten(1, 2))
    return tuple(parts)


def updated_bank(state: LayerState) -> tuple[Tensor, Tensor]:
    """K and V of the bank after the update, [B, bank, N, H, D] float64: the frame that the prompt calls for least has
    given its place to the one that leaves the window."""
    bank, leaving = state.case.bank, state.case.candidates
    mean = state.held_key[:, :bank].double().mean(2)
    victim = torch.einsum("bhd,bfhd->bf", state.text_key.double().mean(1), mean).argmin(1)
    rows = torch.arange(victim.shape[0], device=victim.device)
    parts = []
    for held in (state.held_key, state.held_value):
        frames = held[:, :bank].double()
        frames[rows, victim] = held[:, leaving].double()
        parts.append(frames)
    return tuple(parts)


def by_content(frames: Tensor) -> Tensor:
    """frames [B, F, ...] in the order of their first value: a bank is a set."""
    first = frames.flatten(2)[..., 0]
    order = first.argsort(1)
    return frames[torch.arange(frames.shape[0], device=frames.device)[:, None], order]


def attention_and_gradients(
    query: Tensor, key: Tensor, value: Tensor, upstream: Tensor, visible: Tensor
) -> list[Tensor]:
    """out and the gradients of query, key and value for `upstream`, one head at a time, all in float64.

    visible: True where a query sees a key, [B, H, 1 or Lq, Lk] or [Lq, Lk].
    """
    batch, queries, heads, head_dim = query.shape
    visible = visible.expand(batch, heads, queries, key.shape[1])
    results = [torch.empty_like(x) for x in (query, query, key, value)]
    for row in range(batch):
        for head in range(heads):
            q, k, v, up = (x[row, :, head] for x in (query, key, value, upstream))
            logits = (q @ k.T * head_dim**-0.5).masked_fill(~visible[row, head], -torch.inf)
            share = logits.softmax(-1)
            grad_share = up @ v.T
            grad_logits = share * (grad_share - (grad_share * share).sum(-1, keepdim=True)) * head_dim**-0.5
            parts = (share @ v, grad_logits @ k, grad_logits.T @ q, share.T @ up)
            for result, part in zip(results, parts, strict=True):
                result[row, :, head] = part
    return results

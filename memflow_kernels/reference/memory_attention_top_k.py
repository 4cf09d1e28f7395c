"""memory_attention_top_k: the choice of frames and the attention over them."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..choosing import best_of_few, composed
from .attend import VECTOR, heads_first
from .attention import memory_attention
from .means import frame_means
from .selection import FEW, mean_queries, select_frames
from .shown import SMALL

_CPU = torch.device("cpu")  # whatever torch's default device is; as a text it would be read in every call
_in_steps = composed(frame_means, select_frames, memory_attention)


@lru_cache(maxsize=64)
def _lines(batch: int, heads: int, frames: int, candidates: int, strides: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Where a head's frames lie, counted in frames: its first one [B, H, 1], those behind the candidates [B, H, n]."""
    first = torch.arange(batch)[:, None, None] * strides[0] + torch.arange(heads)[:, None] * strides[1]
    return first, first + torch.arange(candidates, frames)


def _at_once(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    frame_mean: Tensor | None,
    query_mean: Tensor | None,
    tokens_per_frame: int,
    candidates: int,
    top_k: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """In as few steps as a small call on the CPU can do with: where each frame of a head lies in one piece, as in a
    pool, the host sorts, and one list of frames copies keys and values next to each other. None for other calls."""
    batch, tokens, heads, head_dim = key.shape
    frames, line, strides = tokens // tokens_per_frame, tokens_per_frame * head_dim, key.stride()
    behind = (frames - candidates) * tokens_per_frame
    if (
        query.device.type != "cpu"
        or batch * heads * candidates > FEW
        or batch * heads * head_dim * behind > SMALL
        or behind + top_k * tokens_per_frame < VECTOR
        or strides != value.stride()
        or strides[1:] != (head_dim, strides[2], 1)
        or strides[0] % line
        or strides[2] % line
    ):
        return None
    if frame_mean is None:
        frame_mean = frame_means(key[:, : candidates * tokens_per_frame], tokens_per_frame)
    mean_query = mean_queries(query, query.shape[1]) if query_mean is None else query_mean.unsqueeze(1)
    scores = (mean_query * frame_mean).sum(-1).transpose(1, 2)  # [B, H, F], the products and sums of select_frames
    best = best_of_few((scores[0] if batch == 1 else scores.flatten(0, 1)).tolist(), top_k)
    if best is None or all(row == best[0] for row in best):  # what all heads chose need not be copied
        return None
    table = torch.tensor(best, dtype=torch.int32, device=_CPU).view(batch, heads, top_k)
    first, rest = _lines(batch, heads, frames, candidates, (strides[0] // line, strides[2] // line))
    chosen = torch.cat([first + table, rest], 2).flatten()
    size = ((batch - 1) * strides[0] + (heads - 1) * strides[2]) // line + frames, line
    copies = [
        x.as_strided(size, (line, 1)).index_select(0, chosen).view(batch, heads, -1, head_dim) for x in (key, value)
    ]
    out, lse = heads_first(query.transpose(1, 2), *copies, scale=scale)
    return out.transpose(1, 2).contiguous(), lse.contiguous(), table


def memory_attention_top_k(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    frame_mean: Tensor | None,
    query_mean: Tensor | None,
    tokens_per_frame: int,
    candidate_frames: int,
    top_k: int,
    scale: float,
    query_block: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As memory_attention, with the frames that select_frames chooses -> out, lse, frame_table.

    frame_mean [B, candidate_frames, H, D] and query_mean [B, H, D], or None where they are not known.
    """
    arguments = (query, key, value, frame_mean, query_mean, tokens_per_frame, candidate_frames, top_k, scale)
    found = _at_once(*arguments) if query_block is None else None
    return _in_steps(*arguments, query_block) if found is None else found

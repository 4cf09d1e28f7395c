"""memory_attention_top_k: the choice of frames and the attention over them."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from functools import lru_cache
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from ..choosing import best_of_few, composed
from .attend import VECTOR, heads_first, plain
from .attention import memory_attention
from .means import frame_means
from .selection import FEW, mean_queries, select_frames
from .shown import SMALL

COPIED = 2**18  # numbers of keys; where more are copied, fewer steps are no gain
_in_steps = composed(frame_means, select_frames, memory_attention)


class _Layout(NamedTuple):
    """How keys lie in memory, counted in lines: the longest pieces that each frame of a head is made of."""

    frames: list[list[int]]  # where each begins, for every batch row and head
    within: Tensor | None  # [lines] of a frame; None: each is one line
    lines: tuple[int, int]  # all of them, numbers of one
    copied: tuple[int, int, int, int]  # [B, H, tokens, D]


@lru_cache(maxsize=64)
def _layout(shape: torch.Size, strides: tuple, tokens_per_frame: int, candidates: int, top_k: int) -> _Layout | None:
    """Of keys [B, F*N, H, D] of which few are copied; None for others."""
    batch, tokens, heads, head_dim = shape
    seen = tokens - (candidates - top_k) * tokens_per_frame
    whole = tokens_per_frame * head_dim
    line = whole if strides[1] == head_dim and strides[0] % whole == strides[2] % whole == 0 else head_dim
    last = sum((size - 1) * stride for size, stride in zip(shape[:3], strides, strict=False)) // line
    if (
        batch * heads * candidates > FEW
        or batch * heads * (tokens - candidates * tokens_per_frame) * head_dim > SMALL
        or batch * heads * seen * head_dim > COPIED
        or strides[3] != 1
        or any(stride % head_dim for stride in strides[:3])
        or last >= 2**31  # int32 counts them
    ):
        return None
    first = [(row * strides[0] + head * strides[2]) // line for row in range(batch) for head in range(heads)]
    starts = [[start + token * strides[1] // line for token in range(0, tokens, tokens_per_frame)] for start in first]
    within = _integers([token * strides[1] // line for token in range(tokens_per_frame)]) if line == head_dim else None
    return _Layout(starts, within, (last + 1, line), (batch, heads, seen, head_dim))


def _integers(numbers: Iterable[int]) -> Tensor:
    """int32, in a third of the time that torch.tensor takes."""
    return torch.frombuffer(array("i", numbers), dtype=torch.int32)


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
    """In as few steps as a small call on the CPU can do with: the host sorts, and one list of lines copies keys and
    values next to each other. None for other calls."""
    strides = key.stride()
    layout = _layout(key.shape, strides, tokens_per_frame, candidates, top_k) if query.is_cpu else None
    if layout is None or strides != value.stride():
        return None
    if frame_mean is None:
        frame_mean = frame_means(key[:, : candidates * tokens_per_frame], tokens_per_frame)
    mean_query = mean_queries(query, query.shape[1]) if query_mean is None else query_mean.unsqueeze(1)
    scores = (mean_query * frame_mean).sum(-1)  # [B, F, H], the products and sums of select_frames
    best = best_of_few([head for row in scores.tolist() for head in zip(*row, strict=True)], top_k)
    if best is None:
        return None
    table = _integers(chain.from_iterable(best)).view(*layout.copied[:2], top_k)
    chosen: list[int] = []
    for frames, start in zip(best, layout.frames, strict=True):
        chosen += map(start.__getitem__, frames)
        chosen += start[candidates:]
    lines, index = layout.lines, _integers(chosen)
    if layout.within is not None:
        index = (index.unsqueeze(1) + layout.within).flatten()
    copies = [x.as_strided(lines, (lines[1], 1)).index_select(0, index).view(layout.copied) for x in (key, value)]
    if layout.copied[2] < VECTOR:
        out, lse = plain(query, *(x.transpose(1, 2) for x in copies), scale, None)
    else:
        out, lse = heads_first(query.transpose(1, 2), *copies, scale=scale)
        out = out.transpose(1, 2)
    return out.contiguous(), lse.contiguous(), table


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

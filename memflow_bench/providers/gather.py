"""The activation as anyone would write it: choose, gather next to the window, then a dense kernel. For the peers."""

from __future__ import annotations

import torch
from torch import Tensor

from ..states import AttentionState


def choose(state: AttentionState) -> Tensor:
    """[B, H, k]: candidates that each head attends to, ascending."""
    wide = state.frame_mean.dtype
    score = torch.einsum("bhd,bfhd->bhf", state.query.mean(1, dtype=wide), state.frame_mean)
    return score.topk(min(state.top_k, state.case.candidates), dim=-1).indices.sort(dim=-1).values


def keys_and_values(state: AttentionState) -> tuple[Tensor, Tensor]:
    """[B, tokens, H, D]: what the heads attend to; the tensors themselves where the state is dense."""
    if state.top_k is None:
        return state.key, state.value
    tokens, candidates = state.case.tokens, state.case.candidates
    places = choose(state).permute(0, 2, 1)[:, :, None, :, None].expand(-1, -1, tokens, -1, state.case.head_dim)

    def gathered(states: Tensor) -> Tensor:
        frames = states.unflatten(1, (-1, tokens))
        chosen = frames[:, :candidates].gather(1, places)
        return torch.cat([chosen, frames[:, candidates:]], dim=1).flatten(1, 2)

    return gathered(state.key), gathered(state.value)

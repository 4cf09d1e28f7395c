"""The published bank of remembered frames: a full score matrix, a gather, a concatenation, a write back."""

from __future__ import annotations

import torch
from torch import Tensor


class PublishedBank:
    """N frames of K and V of one layer and the pending frame.

    key, value: [B, N*F, H, D] with F tokens per frame; slots: how many frames were ever recorded.
    """

    def __init__(self, key: Tensor, value: Tensor, tokens_per_frame: int):
        self.key, self.value, self.tokens = key, value, tokens_per_frame
        self.frames = key.shape[1] // tokens_per_frame
        self.pending_key = self.pending_value = None
        self.slots = 0

    def record(self, key: Tensor, value: Tensor, slots: int) -> None:
        """The first frame of `key`, `value` [B, L, H, D] waits to be inserted."""
        self.pending_key = key[:, : self.tokens].clone()
        self.pending_value = value[:, : self.tokens].clone()
        self.slots = slots

    def visible(self) -> tuple[Tensor, Tensor]:
        """K and V of the frames that attention sees, copied out as the published system does in every pass."""
        stop = min(self.slots, self.frames) * self.tokens
        return self.key.clone()[:, :stop], self.value.clone()[:, :stop]

    def scores(self, text_key: Tensor, key: Tensor) -> Tensor:
        """[B, N]: mean over heads, text tokens and frame tokens of the scaled products, through the whole matrix."""
        query, keys = text_key.transpose(1, 2), key.transpose(1, 2)
        matrix = query @ keys.mT / text_key.shape[-1] ** 0.5  # [B, H, T, N*F]
        return matrix.mean((1, 2)).unflatten(1, (self.frames, self.tokens)).mean(-1)

    def maintain(self, text_key: Tensor) -> None:
        """Before every chunk: the pending frame goes in; a full bank keeps the best N-1 others, best first.

        text_key: [B, T, H, D], the layer's cross-attention keys of the prompt (zeros right after a switch).
        """
        if self.slots == 0 or self.frames == 0:
            return
        if self.slots <= self.frames:
            place = slice((self.slots - 1) * self.tokens, self.slots * self.tokens)
            self.key[:, place], self.value[:, place] = self.pending_key, self.pending_value
            return
        key, value = self.key.clone(), self.value.clone()
        pending_key, pending_value = self.pending_key.clone(), self.pending_value.clone()
        order = self.scores(text_key, key).sort(dim=1, descending=True, stable=True).indices[:, : self.frames - 1]
        for held, pending, bank in ((key, pending_key, self.key), (value, pending_value, self.value)):
            bank.copy_(torch.cat([take_frames(held, order, self.tokens), pending], dim=1))


def take_frames(states: Tensor, index: Tensor, tokens: int) -> Tensor:
    """states [B, N*F, H, D], index [B, k] -> the named frames [B, k*F, H, D], gathered."""
    frames = states.unflatten(1, (-1, tokens))
    places = index.view(*index.shape, 1, 1, 1).expand(-1, -1, *frames.shape[2:])
    return frames.gather(1, places).flatten(1, 2)

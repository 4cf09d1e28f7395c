"""One self-attention layer of the published system: cache, bank, pass by pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .bank import PublishedBank
from .rotary import rms_norm, rotate_complex


class PublishedLayer:
    """Cache [sink | local] of `window` frames (the sink counted), filled from left to right, and the bank.

    grid: (rows, cols) of tokens in a frame. sink, window, bank: frames.
    """

    def __init__(self, *, batch, heads, head_dim, grid, sink, window, bank, dtype, device):
        self.grid, self.tokens = tuple(grid), grid[0] * grid[1]
        self.sink, self.window = sink, window

        def empty(frames: int) -> Tensor:
            return torch.zeros((batch, frames * self.tokens, heads, head_dim), dtype=dtype, device=device)

        self.key, self.value = empty(window), empty(window)
        self.bank = PublishedBank(empty(bank), empty(bank), self.tokens)
        self.held = 0  # tokens in the cache

    def norm_rotate(self, query: Tensor, key: Tensor, weight_q: Tensor, weight_k: Tensor, eps: float, start_frame: int):
        """query, key [B, L, H*D] as projected -> normed and rotated [B, L, H, D]."""
        heads = self.key.shape[2]
        normed = rms_norm(query, weight_q, eps), rms_norm(key, weight_k, eps)
        return tuple(rotate_complex(x.unflatten(2, (heads, -1)), self.grid, start_frame) for x in normed)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, start_frame: int, store: bool, top_k: int | None = None
    ) -> Tensor:
        """query, key, value [B, L, H, D] of the call's frames -> [B, L, H, D].

        store: the clean pass keeps its K and V; any other works on a copy of the whole cache, which it throws away.
        """
        cache_key, cache_value, held = self.inserted(key, value, start_frame, store)
        edge = self.sink * self.tokens
        bank_key, bank_value = self.bank.visible()
        sink_key, sink_value = cache_key[:, :edge], cache_value[:, :edge]
        local_key, local_value = cache_key[:, edge:held], cache_value[:, edge:held]
        if top_k is None:
            keys = torch.cat([sink_key, bank_key, local_key], dim=1)
            values = torch.cat([sink_value, bank_value, local_value], dim=1)
        else:
            candidates = torch.cat([sink_key, bank_key], dim=1), torch.cat([sink_value, bank_value], dim=1)
            chosen_key, chosen_value = activate(query, *candidates, self.tokens, top_k)
            keys, values = torch.cat([chosen_key, local_key], dim=1), torch.cat([chosen_value, local_value], dim=1)
        out = F.scaled_dot_product_attention(query.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2))
        return out.transpose(1, 2)

    def inserted(self, key: Tensor, value: Tensor, start_frame: int, store: bool) -> tuple[Tensor, Tensor, int]:
        """The cache with the call's frames at its end, and how many tokens it holds."""
        cache = (self.key, self.value) if store else (self.key.clone(), self.value.clone())
        held = 0 if start_frame == 0 else self.held
        edge, capacity, new = self.sink * self.tokens, self.window * self.tokens, key.shape[1]
        overflow = held + new - capacity
        if overflow > 0:
            kept = max(held - edge - overflow, 0)
            for buffer in cache:
                buffer[:, edge : edge + kept] = buffer[:, held - kept : held].clone()
            held = edge + kept
        taken = min(new, capacity - held)
        for buffer, states in zip(cache, (key, value), strict=True):
            buffer[:, held : held + taken] = states[:, new - taken :]
        held += taken
        if store:
            self.held = held
        return *cache, held


def activate(query: Tensor, key: Tensor, value: Tensor, tokens: int, top_k: int) -> tuple[Tensor, Tensor]:
    """K and V [B, k*F, H, D] of the candidate frames that each head chooses, in ascending order, gathered."""
    frames = key.unflatten(1, (-1, tokens))  # [B, n, F, H, D]
    wide = torch.promote_types(query.dtype, torch.float32)  # in half precision near-ties would be decided by rounding
    score = torch.einsum("bhd,bnhd->bhn", query.mean(1, dtype=wide), frames.mean(2, dtype=wide))
    chosen = score.topk(min(top_k, score.shape[-1]), dim=-1).indices.sort(dim=-1).values  # [B, H, k]
    places = chosen.permute(0, 2, 1)[:, :, None, :, None].expand(-1, -1, tokens, -1, key.shape[-1])
    return frames.gather(1, places).flatten(1, 2), value.unflatten(1, (-1, tokens)).gather(1, places).flatten(1, 2)

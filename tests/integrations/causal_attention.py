"""Self-attention with the interface that `memflow.integrations.patch` takes over, its cache in plain buffers.

Written from the description of the published systems (docs/memory.md, docs/integrations.md): the cache is filled from
left to right, rolled when it is full, and joined with the bank for every call.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memflow_kernels.reference.rotary import rotate_3d, rotation_table

DIM, HEADS, GRID, CHUNK, SLOTS = 48, 2, (2, 3), 3, 12
TOKENS = GRID[0] * GRID[1]


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.rand(dim) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)).type_as(x) * self.weight


def wan_freqs(head_dim: int, positions: int = 64) -> Tensor:
    """[positions, D/2]: the turns at (p, p, p)."""
    table = rotation_table(head_dim, positions, (positions, positions), 0, torch.device("cpu"))
    return table[:: positions**2 + positions + 1, 0]


class SelfAttention(nn.Module):
    """top_k: frames of sink and bank that a head keeps, None = all. store: at once, or described to the model.

    The methods in front are what forks change: tests override them one at a time.
    """

    def __init__(self, dim: int, heads: int, sink: int, top_k: int | None, store: bool):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim), RMSNorm(dim)
        self.num_heads, self.sink_size, self.store = heads, sink, store
        self.local_attn_size, self.max_attention_size = SLOTS, SLOTS * TOKENS
        self.SMA, self.top_k, self.record_interval = top_k is not None, top_k or 3, 1

    def turn(self, x, grid, start):
        return rotate_3d(x.double(), grid, start).type_as(x)

    def stored_key(self, key, turned):
        return turned

    def stored_value(self, value, grid, start):
        return value

    def evicted(self, kv_cache, tokens, gone):
        """Called before `gone` frames behind the sink are overwritten."""

    def logits_bias(self, frames, new, tokens):
        return None

    def softmax(self, query, keys, values, bias):
        query, keys, values = (y.transpose(1, 2) for y in (query, keys, values))
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=bias).transpose(1, 2)

    def forward(
        self,
        x,
        seq_lens,
        grid_sizes,
        freqs,
        block_mask,
        kv_cache=None,
        current_start=0,
        cache_start=None,
        kv_bank=None,
        update_bank=False,
        is_recache=False,
    ):
        frames, rows, columns = grid_sizes[0].tolist()
        tokens, start = rows * columns, current_start // (rows * columns)
        query, key, value = (
            y.unflatten(2, (self.num_heads, -1)) for y in (self.norm_q(self.q(x)), self.norm_k(self.k(x)), self.v(x))
        )
        value = self.stored_value(value, (rows, columns), start)
        query = self.turn(query, (rows, columns), start)
        key = self.stored_key(key, self.turn(key, (rows, columns), start))

        end, size = current_start + x.shape[1], kv_cache["k"].shape[1]
        before, held, sink = (
            int(kv_cache["global_end_index"]),
            int(kv_cache["local_end_index"]),
            self.sink_size * tokens,
        )
        states = kv_cache if self.store else {name: kv_cache[name].clone() for name in "kv"}
        last = held + end - before
        gone = max(0, last - size) if end > before else 0
        if gone:
            self.evicted(states, tokens, gone // tokens)
            for name in "kv":
                states[name][:, sink : held - gone] = states[name][:, sink + gone : held].clone()
        last -= gone
        first = last - x.shape[1]
        again = not self.store and current_start > 0 and end <= before
        kept = max(0, sink - first) if again else 0  # the sink stays as it began
        states["k"][:, first + kept : last] = key[:, kept:]
        states["v"][:, first + kept : last] = value[:, kept:]

        chunk, recorded, seen = CHUNK * tokens, 0, 0
        if kv_bank is not None:
            recorded = ((end // chunk - 1) // self.record_interval + 1) * tokens
            offset = int(kv_bank["local_end_index"]) - int(kv_bank["global_end_index"])
            own = 0 if is_recache or current_start // chunk % self.record_interval else tokens
            seen = min(recorded + offset - own, kv_bank["k"].shape[1]) if sink else 0
        local = [states[name][:, min(sink, last) : last] for name in "kv"]
        candidates = [states[name][:, : min(sink, last)] for name in "kv"]
        if seen:
            candidates = [torch.cat([y, kv_bank[name][:, :seen]], 1) for name, y in zip("kv", candidates, strict=True)]
        out = self.attend(query, candidates, local, tokens, frames)

        if self.store:
            for name, index in (("global_end_index", end), ("local_end_index", last)):
                kv_cache[name].fill_(index)
            if kv_bank is not None and update_bank:
                for name, new in (("k_new", key), ("v_new", value)):
                    kv_bank[name].copy_(new[:, :tokens])
                for name in ("global_end_index", "local_end_index"):
                    kv_bank[name].fill_(recorded)
            return self.o(out.flatten(2))
        made = {"k": key[:, kept:], "v": value[:, kept:]}
        update = {"action": "write", "gone": gone, "first": first + kept, "last": last, "is_recompute": again}
        update |= {f"new_{name}": new for name, new in made.items()} | {"recorded": recorded, "tokens": tokens}
        return self.o(out.flatten(2)), (end, last, update)

    def attend(self, query, candidates, local, tokens, new):
        keys, values = candidates
        if self.SMA and self.top_k < keys.shape[1] // tokens:
            means = keys.unflatten(1, (-1, tokens)).mean(2)  # [B, n, H, D]
            scores = torch.einsum("bhd,bnhd->bhn", query.mean(1), means)
            chosen = scores.topk(self.top_k, dim=-1).indices.sort(-1).values  # [B, H, k]
            place = chosen[..., None] * tokens + torch.arange(tokens, device=keys.device)  # [B, H, k, tokens]
            index = place.flatten(2).transpose(1, 2)[..., None].expand(-1, -1, -1, keys.shape[-1])
            keys, values = (y.gather(1, index) for y in (keys, values))
        keys, values = (torch.cat(pair, dim=1) for pair in zip((keys, values), local, strict=True))
        return self.softmax(query, keys, values, self.logits_bias(keys.shape[1] // tokens, new, tokens))

"""A streaming generator with the interface that `memflow.integrations.patch` takes over, its memory in plain buffers.

Written from the description of the published system (docs/memory.md): the cache is filled from left to right, rolled
when it is full, and joined with the bank for every call. `DeferringModel` stores nothing before the pass is over, and
only if asked; `StoringModel` has layers that store at once.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memflow_kernels.reference.rotary import rotate_3d, rotation_table

DIM, HEADS, GRID, CHUNK = 48, 2, (2, 3), 3
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
    """bank_top_k: frames of sink and bank that a head keeps, None = all. store: at once, or given to the caller."""

    def __init__(self, dim: int, heads: int, sink: int, top_k: int | None, store: bool):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim), RMSNorm(dim)
        self.num_heads, self.sink_size, self.top_k, self.store = heads, sink, top_k, store

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
        _, rows, columns = grid_sizes[0].tolist()
        tokens, start = rows * columns, current_start // (rows * columns)
        query, key, value = (
            y.unflatten(2, (self.num_heads, -1)) for y in (self.norm_q(self.q(x)), self.norm_k(self.k(x)), self.v(x))
        )
        query, key = (rotate_3d(y.double(), (rows, columns), start).type_as(y) for y in (query, key))

        # Frames after this call, oldest first: the sink, then the newest of what was held and is new.
        size, sink = kv_cache["k"].shape[1], self.sink_size * tokens
        end, held = current_start + x.shape[1], int(kv_cache["local_end_index"])
        kept = held - (int(kv_cache["global_end_index"]) - current_start) if start else 0
        buffers = []
        for name, new in (("k", key), ("v", value)):
            old = kv_cache[name][:, : max(kept, sink if start else 0)]
            if start == 0:
                first, rest = new[:, :sink], new[:, sink:]
            else:
                both = torch.cat([old, new], dim=1)
                first, rest = both[:, :sink], both[:, sink:]
            rest = rest[:, max(0, rest.shape[1] - (size - sink)) :]
            buffers.append((first, rest))
        seen = 0
        if kv_bank is not None and sink and (start or is_recache):
            seen = min(int(kv_bank["local_end_index"]), kv_bank["k"].shape[1])
        candidates = [
            torch.cat([first, kv_bank[name][:, :seen]], dim=1) if seen else first
            for name, (first, _) in zip("kv", buffers, strict=True)
        ]
        out = self.attend(query, candidates, [rest for _, rest in buffers], tokens)

        store = {"kv": [torch.cat(pair, dim=1) for pair in buffers], "end": end, "prototype": None}
        if kv_bank is not None and update_bank:
            store["prototype"] = [y[:, :tokens].clone() for y in (key, value)]
        if self.store:
            apply(kv_cache, kv_bank, store)
            return self.o(out.flatten(2))
        return self.o(out.flatten(2)), store

    def attend(self, query, candidates, local, tokens):
        keys, values = candidates
        if self.top_k is not None and self.top_k < keys.shape[1] // tokens:
            means = keys.unflatten(1, (-1, tokens)).mean(2)  # [B, n, H, D]
            scores = torch.einsum("bhd,bnhd->bhn", query.mean(1), means)
            chosen = scores.topk(self.top_k, dim=-1).indices.sort(-1).values  # [B, H, k]
            place = chosen[..., None] * tokens + torch.arange(tokens)  # [B, H, k, tokens]
            index = place.flatten(2).transpose(1, 2)[..., None].expand(-1, -1, -1, keys.shape[-1])
            keys, values = (y.gather(1, index) for y in (keys, values))
        keys, values = (torch.cat(pair, dim=1) for pair in zip((keys, values), local, strict=True))
        query, keys, values = (y.transpose(1, 2) for y in (query, keys, values))
        return F.scaled_dot_product_attention(query, keys, values).transpose(1, 2)


def apply(kv_cache: dict, kv_bank: dict | None, store: dict) -> None:
    """Put into a layer's cache and bank what a pass has made."""
    for name, frames in zip("kv", store["kv"], strict=True):
        kv_cache[name][:, : frames.shape[1]] = frames
    kv_cache["global_end_index"].fill_(store["end"])
    kv_cache["local_end_index"].fill_(store["kv"][0].shape[1])
    if store["prototype"] is not None:
        kv_bank["k_new"].copy_(store["prototype"][0])
        kv_bank["v_new"].copy_(store["prototype"][1])
        for name in ("global_end_index", "local_end_index"):
            kv_bank[name].fill_(store["recorded"] if "recorded" in store else store["end"] // CHUNK)


class Block(nn.Module):
    def __init__(self, dim, heads, sink, top_k, store):
        super().__init__()
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.self_attn = SelfAttention(dim, heads, sink, top_k, store)
        self.ffn = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x, **context):
        made = self.self_attn(self.norm(x), **context)
        out, store = made if isinstance(made, tuple) else (made, None)
        x = x + out
        return x + self.ffn(x), store


class StoringModel(nn.Module):
    """Layers store what they write in every pass; there is no bank."""

    def __init__(self, layers: int = 2, sink: int = 3, top_k: int | None = None, store: bool = True):
        super().__init__()
        self.blocks = nn.ModuleList(Block(DIM, HEADS, sink, top_k, store) for _ in range(layers))
        self.freqs = wan_freqs(DIM // HEADS)

    def forward(self, x, kv_cache, current_start, kv_bank=None, update_bank=False, is_recache=False):
        return self.run(x, kv_cache, current_start, kv_bank, update_bank, is_recache)[0]

    def run(self, x, kv_cache, current_start, kv_bank, update_bank, is_recache):
        batch, length, _ = x.shape
        context = {
            "seq_lens": torch.full((batch,), length),
            "grid_sizes": torch.tensor([[length // TOKENS, *GRID]] * batch),
            "freqs": self.freqs,
            "block_mask": None,
            "current_start": current_start,
        }
        stores = []
        for index, block in enumerate(self.blocks):
            bank = {} if kv_bank is None else {"kv_bank": kv_bank[index], "update_bank": update_bank}
            x, store = block(x, kv_cache=kv_cache[index], is_recache=is_recache, **bank, **context)
            stores.append(store)
        return x, stores


class DeferringModel(StoringModel):
    """A pass changes cache and bank only when it is over, and only if `update_cache` says so."""

    def __init__(self, **sizes):
        super().__init__(store=False, **sizes)
        self.record_interval = 1

    def forward(self, x, kv_cache, current_start, kv_bank=None, update_bank=False, is_recache=False, update_cache=True):
        x, stores = self.run(x, kv_cache, current_start, kv_bank, update_bank, is_recache)
        for index, store in enumerate(stores):
            if update_cache and store is not None:
                store["recorded"] = (current_start // (CHUNK * TOKENS * self.record_interval) + 1) * TOKENS
                apply(kv_cache[index], kv_bank and kv_bank[index], store)
        return x


def new_cache(layers: int, slots: int, batch: int = 1, dtype=torch.float32, heads: int = HEADS) -> list[dict]:
    size = (batch, slots * TOKENS, heads, DIM // HEADS)
    return [
        {
            "k": torch.zeros(size, dtype=dtype),
            "v": torch.zeros(size, dtype=dtype),
            "global_end_index": torch.tensor([0]),
            "local_end_index": torch.tensor([0]),
        }
        for _ in range(layers)
    ]


def new_bank(layers: int, places: int, batch: int = 1) -> list[dict]:
    return [
        bank | {name: torch.zeros_like(bank["k"][:, :TOKENS]) for name in ("k_new", "v_new")}
        for bank in new_cache(layers, places, batch)
    ]


class Generator:
    """Chunk after chunk, as a streaming pipeline drives such a model: two denoising passes, then the one that fixes it.

    The bank is maintained here, by copying: the oldest frame leaves when it is full. `seen` has what every call left
    in the caller's indices.
    """

    def __init__(self, model: StoringModel, slots: int = 12, places: int | None = 3, batch: int = 1):
        layers = len(model.blocks)
        self.model, self.slots, self.places = model, slots, places
        self.cache = new_cache(layers, slots, batch)
        self.bank = None if places is None else new_bank(layers, places, batch)
        self.noise = torch.Generator().manual_seed(0)
        self.batch, self.position, self.prompt = batch, 0, 0.0
        self.made: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.seen: list[list[int]] = []

    @torch.no_grad()
    def chunk(self) -> None:
        start = self.position * CHUNK
        for _ in range(2):
            self.maintain()
            x = torch.randn(self.batch, CHUNK * TOKENS, DIM, generator=self.noise) + self.prompt
            out = self.call(x, start, update_cache=False)
        self.call(out, start, update_bank=True)
        self.made.append(out)
        self.position += 1

    @torch.no_grad()
    def switch(self, empty: bool = False) -> None:
        """A new prompt: encode the newest frames again."""
        self.prompt += 1.0
        if empty:
            for cache in self.cache:
                cache["k"].zero_()
                cache["v"].zero_()
        start = self.position * CHUNK
        count = min(self.slots, start)
        self.maintain()
        frames = torch.cat(self.made, dim=1)[:, -count * TOKENS :] + self.prompt
        self.call(frames, start - count, is_recache=True)

    def call(self, x: Tensor, start: int, update_cache: bool = True, **context) -> Tensor:
        if isinstance(self.model, DeferringModel):
            context["update_cache"] = update_cache
        if self.bank is not None:
            context["kv_bank"] = self.bank
        out = self.model(x, self.cache, start * TOKENS, **context)
        self.outputs.append(out)
        self.seen.append(
            [
                int(entry[name])
                for entries in (self.cache, self.bank or [])
                for entry in entries
                for name in ("global_end_index", "local_end_index")
            ]
        )
        return out

    def maintain(self) -> None:
        for bank in self.bank or []:
            recorded = int(bank["local_end_index"]) // TOKENS
            if not recorded:
                continue
            if recorded > self.places:
                for name in "kv":
                    bank[name][:, :-TOKENS] = bank[name][:, TOKENS:].clone()
            place = (min(recorded, self.places) - 1) * TOKENS
            for name in "kv":
                bank[name][:, place : place + TOKENS] = bank[f"{name}_new"]

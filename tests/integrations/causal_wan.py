"""A streaming generator with the layers of causal_attention.py, its memory in plain buffers.

`StoringModel` has layers that store at once, whatever place their frames have. `DeferringModel` stores nothing before
the pass is over, and only if asked; its layers describe the update, and leave the sink alone when frames are encoded
again.
"""

from __future__ import annotations

import torch
from causal_attention import CHUNK, DIM, GRID, HEADS, SLOTS, TOKENS, SelfAttention, wan_freqs
from torch import Tensor, nn


def apply(kv_cache: dict, kv_bank: dict | None, made: tuple, sink: int, update_bank: bool) -> None:
    """Put into a layer's cache and bank what a pass has made."""
    end, last, update = made
    tokens, gone = update.get("tokens", 0), update.get("gone", 0)
    if update["action"] == "write":
        held = int(kv_cache["local_end_index"])
        for name in "kv":
            if gone:
                kv_cache[name][:, sink * tokens : held - gone] = kv_cache[name][:, sink * tokens + gone : held].clone()
            kv_cache[name][:, update["first"] : update["last"]] = update[f"new_{name}"]
            if kv_bank is not None and update_bank:
                kv_bank[f"{name}_new"].copy_(update[f"new_{name}"][:, :tokens])
    if not update["is_recompute"]:
        kv_cache["global_end_index"].fill_(end)
        kv_cache["local_end_index"].fill_(last)
        if kv_bank is not None and update_bank:
            for name in ("global_end_index", "local_end_index"):
                kv_bank[name].fill_(update["recorded"])


class Block(nn.Module):
    """It has the attributes that published blocks have, those of a self-attention among them, and passes on the same
    parameters."""

    def __init__(self, dim, heads, sink, top_k, store, attention=SelfAttention):
        super().__init__()
        self.dim, self.num_heads, self.local_attn_size, self.qk_norm, self.eps = dim, heads, SLOTS, True, 1e-6
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False)
        self.self_attn = attention(dim, heads, sink, top_k, store)
        self.ffn = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

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
        made = self.self_attn(
            self.norm1(x), seq_lens, grid_sizes, freqs, block_mask, kv_cache, current_start, cache_start, kv_bank,
            update_bank, is_recache,
        )  # fmt: skip
        out, update = made if isinstance(made, tuple) else (made, None)
        x = x + out
        return x + self.ffn(x), update


class StoringModel(nn.Module):
    """Layers store what they write in every pass."""

    def __init__(
        self, layers: int = 2, sink: int = 3, top_k: int | None = None, store: bool = True, attention=SelfAttention
    ):
        super().__init__()
        self.num_frame_per_block = CHUNK
        self.blocks = nn.ModuleList(Block(DIM, HEADS, sink, top_k, store, attention) for _ in range(layers))
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
        updates = []
        for index, block in enumerate(self.blocks):
            bank = {} if kv_bank is None else {"kv_bank": kv_bank[index], "update_bank": update_bank}
            x, update = block(x, kv_cache=kv_cache[index], is_recache=is_recache, **bank, **context)
            updates.append(update)
        return x, updates


class DeferringModel(StoringModel):
    """A pass changes cache and bank only when it is over, and only if `update_cache` says so."""

    def __init__(self, **sizes):
        super().__init__(store=False, **sizes)

    def forward(self, x, kv_cache, current_start, kv_bank=None, update_bank=False, is_recache=False, update_cache=True):
        x, updates = self.run(x, kv_cache, current_start, kv_bank, update_bank, is_recache)
        for index, update in enumerate(updates):
            if update_cache:
                sink = self.blocks[index].self_attn.sink_size
                apply(kv_cache[index], kv_bank and kv_bank[index], update, sink, update_bank)
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

"""A streaming generator with the interface that `memflow.integrations.patch` takes over, its memory in plain buffers.

Written from the description of the published systems (docs/memory.md, docs/integrations.md): the cache is filled from
left to right, rolled when it is full, and joined with the bank for every call. `StoringModel` has layers that store at
once, whatever place their frames have. `DeferringModel` stores nothing before the pass is over, and only if asked; its
layers describe the update, and leave the sink alone when frames are encoded again.
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

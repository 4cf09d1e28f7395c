"""One call of a patched self-attention: norm, rotation and write into the caller's buffers, then attention in place."""

from __future__ import annotations

import torch
from torch import Tensor

from memflow.integrations.bank import FrameBank
from memflow.integrations.cache import FrameCache
from memflow.memory.config import MemoryConfig
from memflow_kernels import memory_attention, merge_attention, qk_norm_rope_write, select_frames


class CallerAttention:
    """Attends over what a caller keeps.

    module: the self-attention, for its weights. name: its name in the model, for errors. memory: what the caller's
    cache holds and how many frames are activated.
    """

    def __init__(self, module, name: str, memory: MemoryConfig):
        self.module, self.name, self.memory = module, name, memory

    def __call__(
        self,
        x: Tensor,
        grid: tuple[int, int, int],
        start: int,
        kv_cache: dict,
        kv_bank: dict | None,
        record: bool,
        is_recache: bool,
        stored: bool,
    ) -> tuple[Tensor, FrameCache]:
        """x [B, F*N, C] of `grid` = (F, rows, columns), whose first frame has the number `start`."""
        count, rows, columns = grid
        tokens = rows * columns
        cache = FrameCache.of(kv_cache, tokens, self.memory.sink_frames)
        places = cache.place(start, count)
        bank = None if kv_bank is None else FrameBank.of(kv_bank, tokens)
        # The bank is seen from the second chunk on, and only beside a sink.
        seen = bank.visible(kv_bank) if bank and self.memory.sink_frames and (start or is_recache) else 0
        candidates = min(self.memory.sink_frames, len(cache.frames)) + seen
        chooses = self.memory.top_k is not None and self.memory.top_k < candidates
        if self.memory.top_k is not None:
            cache.refresh_means(kv_cache)
        query, query_mean = self._write(x, (rows, columns), start, cache, kv_cache, places, chooses)
        choice = self._choose(query_mean, cache, bank, kv_bank, seen) if chooses else None
        out = self._attend(query, choice, cache, kv_cache, kv_bank, seen)
        cache.end_call(kv_cache, start, start + count, stored)
        if bank and record and stored and not is_recache:
            frame = slice(places[0] * tokens, (places[0] + 1) * tokens)
            recorded = start // (count * self.memory.record_interval) + 1
            bank.record(kv_bank, kv_cache["k"][:, frame], kv_cache["v"][:, frame], recorded)
        return self.module.o(out.flatten(2)), cache

    def _write(
        self,
        x: Tensor,
        grid: tuple[int, int],
        start: int,
        cache: FrameCache,
        kv_cache: dict,
        places: list[int],
        chooses: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Queries [B, L, H, D] and, where heads choose frames, their mean [B, H, D]."""
        module = self.module
        heads = (module.num_heads, -1)
        query, key, value = (linear(x).unflatten(2, heads) for linear in (module.q, module.k, module.v))
        held = kv_cache["k"]
        if query.shape[::2] != held.shape[::2] or query.shape[3] != held.shape[3] or query.dtype != held.dtype:
            raise ValueError(
                f"{self.name}: kv_cache['k'] is {held.dtype} {list(held.shape)}; q, k and v of this call give "
                f"{query.dtype}, batch {query.shape[0]}, {query.shape[2]} heads x {query.shape[3]}"
            )
        written = qk_norm_rope_write(
            query,
            key,
            value,
            weight_q=module.norm_q.weight,
            weight_k=module.norm_k.weight,
            eps=module.norm_q.eps,
            grid=grid,
            start_frame=torch.full((1,), start, device=x.device),
            pool=cache.pool(kv_cache),
            slots=torch.tensor(places, dtype=torch.int32).to(x.device, non_blocking=True),
            query_mean=chooses,
        )
        cache.written(kv_cache)
        return written if chooses else (written, None)

    def _choose(self, query_mean: Tensor, cache: FrameCache, bank: FrameBank | None, kv_bank, seen: int) -> Tensor:
        """[B, H, top_k]: what each head keeps of the sink's frames and, numbered on from them, the bank's."""
        means = cache.frame_mean[:, : min(self.memory.sink_frames, len(cache.frames))]
        if seen:
            means = torch.cat([means, bank.frame_means(kv_bank, seen)], dim=1)
        return select_frames(query_mean.unsqueeze(1), means, self.memory.top_k)

    def _attend(self, query: Tensor, choice: Tensor | None, cache: FrameCache, kv_cache, kv_bank, seen: int) -> Tensor:
        """Attention over the cache and over `seen` frames of the bank, two buffers that are never joined: each gives
        its part of the softmax."""
        tokens, sink = cache.tokens, min(self.memory.sink_frames, len(cache.frames))
        parts = []
        for entries, first, frames, candidates in (
            (kv_cache, 0, len(cache.frames), sink),
            (kv_bank, sink, seen, seen),
        ):
            if not frames:
                continue
            activation = {}
            if choice is not None:
                inside = (choice >= first) & (choice < first + candidates)
                table = (choice - first).masked_fill(~inside, -1)
                activation = {"candidate_frames": candidates, "frame_table": table}
            states = (entries[name][:, : frames * tokens] for name in ("k", "v"))
            parts.append(memory_attention(query, *states, tokens_per_frame=tokens, return_lse=True, **activation))
        return parts[0][0] if len(parts) == 1 else merge_attention(*parts[0], *parts[1])[0]

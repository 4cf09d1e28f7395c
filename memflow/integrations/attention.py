"""One call of a patched self-attention: norm, rotation and write into the caller's buffers, then attention in place."""

from __future__ import annotations

import torch
from torch import Tensor

from memflow.integrations.bank import FrameBank
from memflow.integrations.cache import FrameCache
from memflow.memory import MemoryConfig
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
        activated = self.memory.top_k is not None
        if activated:
            cache.refresh_means(kv_cache)
        query = self._write(x, (rows, columns), start, cache, kv_cache, places)
        bank = None if kv_bank is None else FrameBank.of(kv_bank, tokens)
        # The bank is seen from the second chunk on, and only beside a sink.
        seen = bank.visible(kv_bank) if bank and self.memory.sink_frames and (start or is_recache) else 0
        out = self._attend(query, cache, kv_cache, bank, kv_bank, seen)
        cache.end_call(kv_cache, start, start + count, stored)
        if bank and record and stored and not is_recache:
            frame = slice(places[0] * tokens, (places[0] + 1) * tokens)
            recorded = start // (count * self.memory.record_interval) + 1
            bank.record(kv_bank, kv_cache["k"][:, frame], kv_cache["v"][:, frame], recorded)
        return self.module.o(out.flatten(2)), cache

    def _write(self, x, grid, start, cache: FrameCache, kv_cache: dict, places: list[int]) -> Tensor:
        module = self.module
        heads = (module.num_heads, -1)
        query, key, value = (linear(x).unflatten(2, heads) for linear in (module.q, module.k, module.v))
        held = kv_cache["k"]
        if query.shape[::2] != held.shape[::2] or query.shape[3] != held.shape[3] or query.dtype != held.dtype:
            raise ValueError(
                f"{self.name}: kv_cache['k'] is {held.dtype} {list(held.shape)}; q, k and v of this call give "
                f"{query.dtype}, batch {query.shape[0]}, {query.shape[2]} heads x {query.shape[3]}"
            )
        query = qk_norm_rope_write(
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
        )
        cache.written(kv_cache)
        return query

    def _attend(self, query: Tensor, cache: FrameCache, kv_cache: dict, bank, kv_bank, seen: int) -> Tensor:
        """Attention over the cache and over `seen` frames of the bank, two buffers that are never joined: each gives
        its part of the softmax. The choice of frames is one choice among the sink's and the bank's."""
        top_k, tokens = self.memory.top_k, cache.tokens
        sink = min(self.memory.sink_frames, len(cache.frames))
        held = [kv_cache[name][:, : len(cache.frames) * tokens] for name in ("k", "v")]
        means = cache.frame_mean[:, :sink]
        if not seen:
            activation = {} if top_k is None else {"candidate_frames": sink, "top_k": top_k, "frame_mean": means}
            return memory_attention(query, *held, tokens_per_frame=tokens, **activation)
        remembered = [kv_bank[name][:, : seen * tokens] for name in ("k", "v")]
        from_cache, from_bank = {}, {}
        if top_k is not None and top_k < sink + seen:
            choice = select_frames(query, torch.cat([means, bank.frame_means(kv_bank, seen)], dim=1), top_k)
            from_cache = {"candidate_frames": sink, "frame_table": choice.masked_fill(choice >= sink, -1)}
            from_bank = {"candidate_frames": seen, "frame_table": (choice - sink).clamp(min=-1)}
        parts = [
            memory_attention(query, *states, tokens_per_frame=tokens, return_lse=True, **activation)
            for states, activation in ((held, from_cache), (remembered, from_bank))
        ]
        return merge_attention(*parts[0], *parts[1])[0]

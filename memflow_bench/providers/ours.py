"""memflow_kernels, one provider per backend."""

from __future__ import annotations

import functools

import torch

from memflow.memory.attention import attend
from memflow_kernels import (
    available_backends,
    block_causal_table,
    frame_means,
    memory_attention,
    qk_norm_rope_write,
    use_backend,
)
from memflow_kernels.cuda import extension

from ..states import EPS, AttentionState, LayerState, our_memory
from ..workloads.training import BlockCausalState, TrainingState
from ..workloads.whole_layer import PASSES, ChunkState
from .base import Provider
from .steps import Attend, backward, step


class Ours(Provider):
    def __init__(self, backend: str):
        self.backend = backend
        self.name = f"ours ({backend})"

    def missing(self, device, dtype):
        reason = available_backends()[self.backend]
        if reason is None and self.backend != "torch" and device.type == "cpu":
            reason = "runs on a GPU only; on the CPU its interpreter is for tests"
        return reason or (_compiled_missing(device, dtype) if self.backend == "cuda" else None)

    def prepare(self, workload, state):
        run = super().prepare(workload, state)
        if run is None:
            return None

        def forced():
            with use_backend(self.backend):
                return run()

        return forced

    def attention(self, state: AttentionState):
        attend = _activated(state)
        return lambda: attend(state.query, state.key, state.value)

    def training(self, state: TrainingState):
        call = state.call
        return step(_activated(call), call.query, call.key, call.value, state.upstream)

    def backward(self, state: TrainingState):
        call = state.call
        return backward(_activated(call), call.query, call.key, call.value, state.upstream)

    def block_causal(self, state: BlockCausalState):
        attend = _block_causal(state)
        return lambda: attend(state.query, state.key, state.value)

    def block_causal_step(self, state: BlockCausalState):
        return step(_block_causal(state), state.query, state.key, state.value, state.upstream)

    def means(self, state: AttentionState):
        key = state.key[:, : state.case.candidates * state.case.tokens]
        return lambda: frame_means(key, state.case.tokens)

    def write(self, state: LayerState):
        memory, step = our_memory(state)
        tokens = state.case.tokens
        slots = step.slots.tolist()

        def run():
            query, _ = _write(state, step)
            first = slots[0] * tokens  # the chunk's slots lie side by side
            return query, memory.pool.key[0, :, first : first + state.case.queries]

        return run

    def update(self, state: LayerState):
        memory, step = our_memory(state, state.case.layers if state.key.is_cuda else 1)

        def run():
            memory.updated_for = -1  # or a second update for the same chunk would do nothing
            memory.update(state.start_frame, step.prompt)
            bank = memory.pool.key[0, :, : state.case.bank * state.case.tokens]
            return bank.unflatten(1, (state.case.bank, -1))

        return run

    def layer(self, state: LayerState):
        _, step = our_memory(state)
        means = step.block_means[0] if step.block_means else None
        return lambda: attend(*_write(state, step), step.pools[0], step, means)

    def chunk(self, state: ChunkState):
        from memflow.models.wan.attention import MemorySelfAttention  # needs diffusers

        memory, step = our_memory(state.layer)
        processor = MemorySelfAttention(0)
        processor.bind(step, clean=False)

        @torch.no_grad()
        def run():
            memory.updated_for = -1
            memory.update(state.layer.start_frame, step.prompt)
            for _ in range(PASSES + 1):
                out = processor(state.attn, state.hidden, rotary_emb=step)
            return out

        return run


def _activated(state: AttentionState) -> Attend:
    options = {"tokens_per_frame": state.case.tokens}
    if state.top_k is not None:
        options |= {"candidate_frames": state.case.candidates, "top_k": state.top_k, "frame_mean": state.frame_mean}
    return functools.partial(memory_attention, **options)


def _block_causal(state: BlockCausalState) -> Attend:
    case = state.case
    table = block_causal_table(case.window, case.chunk, batch=case.batch, heads=case.heads, device=state.query.device)
    sizes = {"tokens_per_frame": case.tokens, "query_block": case.tokens, "candidate_frames": case.window}
    return functools.partial(memory_attention, frame_table=table, **sizes)


def _compiled_missing(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the row would not show the compiled kernels, but those that run in their place."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"attention in {dtype} has no compiled kernel"
    return extension.unloadable() or extension.not_compiled_for(device.index or 0)


def _write(state: LayerState, step):
    """The queries and, where heads choose frames by it, their mean."""
    heads = state.case.heads
    written = qk_norm_rope_write(
        *(x.unflatten(2, (heads, -1)) for x in (state.query, state.key, state.value)),
        weight_q=state.weight_q,
        weight_k=state.weight_k,
        eps=EPS,
        grid=step.grid,
        start_frame=step.start_frame,
        pool=step.pools[0],
        slots=step.slots,
        query_mean=step.chooses,
    )
    return written if step.chooses else (written, None)

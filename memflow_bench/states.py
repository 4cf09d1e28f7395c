"""Random states of a case: an attention call, and one layer in the middle of a stream, bank, sink and window full."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from memflow.memory import FrameMemory, MemoryConfig, Pass, Prompt, make_memory
from memflow_kernels import frame_means

from .cases import Case
from .published_path import PublishedLayer

EPS = 1e-6


class AttentionState(NamedTuple):
    """query [B, Lq, H, D]; key, value [B, F*N, H, D], candidates first; frame_mean [B, candidates, H, D]; top_k None =
    dense."""

    case: Case
    query: Tensor
    key: Tensor
    value: Tensor
    frame_mean: Tensor
    top_k: int | None


class LayerState(NamedTuple):
    """The projections of a chunk and the memory before it.

    query, key, value: [B, Lq, H*D] as the linears give them. weight_q, weight_k: [H*D].
    held_key, held_value: [B, frames, N, H, D], the frames bank, sink, window in this order, the window oldest first.
    text_key: [B, T, H, D]. start_frame: number of the chunk's first frame. top_k None = dense.
    """

    case: Case
    query: Tensor
    key: Tensor
    value: Tensor
    weight_q: Tensor
    weight_k: Tensor
    held_key: Tensor
    held_value: Tensor
    text_key: Tensor
    start_frame: int
    top_k: int | None


class Random:
    """Normal random tensors, the same on every device."""

    def __init__(self, dtype: torch.dtype, device: torch.device, seed: int):
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, self.dtype)

    def frames(self, case: Case, frames: int) -> Tensor:
        """[B, frames, N, H, D]; frames differ in their means, so that a frame too few or too many shows."""
        offset = self(case.batch, frames, 1, case.heads, case.head_dim)
        return self(case.batch, frames, case.tokens, case.heads, case.head_dim) + offset


def attention_state(
    case: Case, activated: bool, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> AttentionState:
    random = Random(dtype, device, seed)
    query = random(case.batch, case.queries, case.heads, case.head_dim)
    key, value = (random.frames(case, case.frames).flatten(1, 2) for _ in range(2))
    means = frame_means(key[:, : case.candidates * case.tokens], case.tokens)
    return AttentionState(case, query, key, value, means, case.top_k if activated else None)


def layer_state(case: Case, activated: bool, dtype: torch.dtype, device: torch.device, seed: int = 0) -> LayerState:
    random = Random(dtype, device, seed)
    # Queries share a direction, as they do in trained models: the choice of frames is then not one of rounding.
    query, key, value = (random(case.batch, case.queries, case.dim) + random(case.dim) for _ in range(3))
    start = case.chunk * -(-(case.sink + 2 * case.window) // case.chunk)
    return LayerState(
        case,
        query,
        key,
        value,
        1 + 0.1 * random(case.dim),
        1 + 0.1 * random(case.dim),
        random.frames(case, case.frames),
        random.frames(case, case.frames),
        random(case.batch, case.text_tokens, case.heads, case.head_dim),
        start,
        case.top_k if activated else None,
    )


def our_memory(state: LayerState, layers: int = 1) -> tuple[FrameMemory, Pass]:
    """Our memory with the frames of `state` in every layer, and the pass over its chunk."""
    case, key = state.case, state.held_key
    config = MemoryConfig(
        frames_per_chunk=case.chunk,
        sink_frames=case.sink,
        window_frames=case.window,
        bank_frames=case.bank,
        **_activation(state),
    )
    sizes = {"layers": layers, "batch": case.batch, "heads": case.heads, "head_dim": case.head_dim, "grid": case.grid}
    memory = make_memory(config, **sizes, dtype=key.dtype, device=key.device)
    pool, first_window = memory.pool, state.start_frame - case.window
    slots = [*range(case.candidates), *(pool.slot_of(first_window + i) for i in range(case.window))]
    for buffer, held in ((pool.key, state.held_key), (pool.value, state.held_value)):
        buffer.unflatten(2, (-1, case.tokens))[:, :, slots] = held
    pool.frame_mean.copy_(frame_means(pool.key.flatten(0, 1), case.tokens).view_as(pool.frame_mean))
    pool.average_blocks()
    memory.bank_used = case.bank
    memory.shown[:] = torch.arange(case.sink, case.sink + case.bank, device=key.device)
    text = state.text_key.expand(layers, *state.text_key.shape)
    prompt = Prompt(text, text, torch.ones(text.shape[1:3], dtype=torch.bool, device=key.device))
    return memory, memory.pass_over(state.start_frame, case.chunk, prompt)


def _activation(state: LayerState) -> dict[str, int | None]:
    """As MemoryConfig says it."""
    block = state.case.activation_block
    if state.top_k is None or not block:
        return {"top_k": state.top_k}
    return {"activated": state.top_k * block, "activation_block": block}


def published_layer(state: LayerState) -> PublishedLayer:
    """The published layer with the frames of `state`; the frame about to enter the bank is the one ours moves."""
    case, key = state.case, state.held_key
    layer = PublishedLayer(
        batch=case.batch,
        heads=case.heads,
        head_dim=case.head_dim,
        grid=case.grid,
        sink=case.sink,
        window=case.sink + case.window,
        bank=case.bank,
        dtype=key.dtype,
        device=key.device,
    )
    for name in ("key", "value"):
        held = getattr(state, f"held_{name}")
        getattr(layer, name).copy_(held[:, case.bank :].flatten(1, 2))
        getattr(layer.bank, name).copy_(held[:, : case.bank].flatten(1, 2))
    layer.held = layer.key.shape[1]
    leaving = case.candidates * case.tokens
    layer.bank.record(
        state.held_key.flatten(1, 2)[:, leaving:], state.held_value.flatten(1, 2)[:, leaving:], case.bank + 1
    )
    return layer

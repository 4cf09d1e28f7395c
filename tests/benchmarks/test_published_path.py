"""The published path computes what ours computes, and moves what the published system moves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanAttention

from memflow.memory import MemoryConfig, Prompt, make_memory
from memflow.models.wan.attention import MemorySelfAttention
from memflow_bench.models import in_float64
from memflow_bench.published_path import PublishedLayer, rms_norm, rotate_complex
from memflow_bench.published_path.stream import PublishedPass, PublishedStream, SelfAttention
from memflow_bench.states import layer_state, published_layer
from memflow_bench.untrained import noise_pipeline
from memflow_kernels import reference
from memflow_kernels.testing import Traffic, assert_close

HEADS, DIM, GRID = 3, 20, (3, 4)
TOKENS = GRID[0] * GRID[1]
PUBLISHED = MemoryConfig.published(record_interval=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_norm_and_rotation_are_those_of_the_kernels(dtype):
    x, weight = torch.randn(2, 2 * TOKENS, HEADS * DIM).to(dtype), torch.randn(HEADS * DIM).to(dtype)
    normed = rms_norm(x, weight, 1e-6)
    assert_close(normed, reference.rms_norm(x, weight, 1e-6))
    heads = normed.unflatten(2, (HEADS, DIM))
    assert_close(rotate_complex(heads, GRID, 40), reference.rotate_3d(heads, GRID, 40))


class Pair:
    """One layer with its linears, driven as a stream is: ours with the published memory, and the published path."""

    def __init__(self, dtype: torch.dtype, batch: int = 2):
        torch.manual_seed(0)
        self.attn = WanAttention(HEADS * DIM, HEADS, DIM, 1e-6).to(dtype)
        sizes = {"batch": batch, "heads": HEADS, "head_dim": DIM, "grid": GRID, "dtype": dtype, "device": "cpu"}
        self.memory = make_memory(PUBLISHED, layers=1, **sizes)
        self.layer = PublishedLayer(sink=3, window=12, bank=3, **sizes)
        self.processors = MemorySelfAttention(0), SelfAttention(0)
        self.text = torch.randn(batch, 6, HEADS, DIM, dtype=dtype)
        self.prompt = Prompt(self.text[None], self.text[None], torch.ones(batch, 6, dtype=torch.bool))
        self.known = False

    def update(self, start: int) -> None:
        self.memory.text_known = self.known
        self.memory.update(start, self.prompt)
        self.layer.bank.maintain(self.text if self.known else torch.zeros_like(self.text))

    def outputs(self, start: int, hidden: torch.Tensor, store: bool, top_k: int | None):
        step = self.memory.pass_over(start, hidden.shape[1] // TOKENS, self.prompt)._replace(top_k=top_k)
        self.processors[0].bind(step, clean=False)
        yield self.processors[0](self.attn, hidden, rotary_emb=step)
        step = PublishedPass([self.layer], self.prompt, start, store, top_k)
        yield self.processors[1](self.attn, hidden, rotary_emb=step)

    def chunk(self, index: int, top_k: int | None) -> None:
        start, hidden = 3 * index, torch.randn(2, 3 * TOKENS, HEADS * DIM, dtype=self.text.dtype)
        self.update(start)
        for store in (False, True):
            ours, theirs = self.outputs(start, hidden * (2 - store), store, top_k)
            assert_close(theirs, ours)
        self.memory.end_chunk(start)
        if index % PUBLISHED.record_interval == 0:
            self.layer.bank.record(*self.processors[1].written, index // PUBLISHED.record_interval + 1)
        self.known = True


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("top_k", [None, 3], ids=["dense", "activated"])
def test_a_layer_equals_ours_over_a_stream(dtype, top_k):
    """14 chunks: the cache fills and rolls, the bank fills and retrieves; with float64 nothing but order may differ."""
    pair = Pair(dtype)
    for index in range(14):
        pair.chunk(index, top_k)
    assert pair.layer.bank.slots > pair.layer.bank.frames
    assert pair.layer.held == 12 * TOKENS


@pytest.mark.parametrize("top_k", [None, 3], ids=["dense", "activated"])
def test_a_stream_equals_ours(top_k):
    """The toy model in float64, a prompt switch before and one after the window is full, to the latents."""
    pipeline = in_float64(noise_pipeline())
    config = replace(MemoryConfig.published(), top_k=top_k)
    size = {"height": 32, "width": 32}
    ours = pipeline.stream(["a", "b", "c"], seconds_per_prompt=3 * 12 / 16, memory=config, **size)
    theirs = PublishedStream(pipeline, config=config, seeds=[0], **size)
    for chunk in ours:
        if chunk.switched:
            theirs.switch(*pipeline.encode(chunk.prompts))
        assert_close(theirs.chunk(), chunk.latents)
    assert ours.position == 9


@pytest.mark.parametrize(("top_k", "units"), [(None, 180), (3, 204)], ids=["dense", "activated"])
def test_it_copies_what_the_published_path_copies(tiny, top_k, units):
    """In units of one frame of K or V, read or written: clones 60, roll 48, insertion 12, concatenation 60; activated
    candidates 24, gathered 12, concatenation 48."""
    state = layer_state(replace(tiny, batch=1, top_k=3), top_k is not None, torch.float32, torch.device("cpu"))
    layer = published_layer(state)
    query, key = layer.norm_rotate(state.query, state.key, state.weight_q, state.weight_k, 1e-6, state.start_frame)
    value = state.value.unflatten(2, (tiny.heads, -1))
    unit = tiny.tokens * tiny.dim * 4
    with Traffic() as traffic:
        layer.attend(query, key, value, start_frame=state.start_frame, store=False, top_k=state.top_k)
    copied = [(name, written) for name, written in traffic.written if name.split("::")[1] in COPIES]
    assert sum(2 * written for _, written in copied) / unit == units, copied


COPIES = {"clone", "copy_", "cat", "gather"}

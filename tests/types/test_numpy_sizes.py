"""Sizes and numbers that come out of numpy are taken wherever Python's own are, with the same result."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from memflow_kernels import (
    Pool,
    block_causal_table,
    frame_means,
    memory_attention,
    prompt_relevance,
    qk_norm_rope,
    qk_norm_rope_write,
    rotate_keys,
    select_frames,
)

QUERY, KEY = torch.randn(1, 12, 2, 16), torch.randn(1, 24, 2, 16)
WEIGHT = torch.ones(32)
NORM = {"weight_q": WEIGHT, "weight_k": WEIGHT}


def written(**options) -> torch.Tensor:
    pool = Pool.zeros(1, 4, 6, heads=2, head_dim=16)
    slots = torch.tensor([3, -1], dtype=torch.int32)
    qk_norm_rope_write(QUERY, QUERY, QUERY, **NORM, pool=pool, slots=slots, **options)
    return pool.key


CALLS = {
    "memory_attention": (
        lambda **options: memory_attention(QUERY, KEY, KEY, **options),
        {"tokens_per_frame": 4, "candidate_frames": 4, "top_k": 2, "query_block": 5, "scale": 0.25},
    ),
    "frame_means": (lambda tokens: frame_means(KEY, tokens), {"tokens": 4}),
    "prompt_relevance": (lambda **options: prompt_relevance(QUERY, KEY, **options), {"tokens_per_frame": 4}),
    "select_frames": (
        lambda **options: select_frames(QUERY, frame_means(KEY, 4), **options),
        {"top_k": 2, "query_block": 5},
    ),
    "qk_norm_rope": (
        lambda **options: qk_norm_rope(QUERY, QUERY, **NORM, **options)[0],
        {"eps": 2**-20, "grid": (2, 3), "start_frame": 7, "axes": (8, 4, 4), "theta": 100.0},
    ),
    "qk_norm_rope_write": (written, {"eps": 2**-20, "grid": (2, 3), "start_frame": 7}),
    "rotate_keys": (
        lambda **options: rotate_keys(KEY, torch.arange(6), **options),
        {"tokens_per_frame": 4, "channels": 8, "theta": 100.0},
    ),
    "block_causal_table": (
        block_causal_table,
        {"frames": 9, "frames_per_block": 3, "local": 6, "sink": 1, "first_block": 1, "batch": 2, "heads": 2},
    ),
    "Pool.zeros": (
        lambda **options: Pool.zeros(**options).key,
        {"batch": 1, "slots": 4, "tokens_per_frame": 6, "heads": 2, "head_dim": 16},
    ),
}


def numpy_number(value):
    if isinstance(value, tuple):
        return tuple(map(numpy_number, value))
    return np.int64(value) if isinstance(value, int) else np.float32(value)


@pytest.mark.parametrize("name", CALLS)
def test_ops(name):
    call, options = CALLS[name]
    torch.testing.assert_close(call(**{k: numpy_number(x) for k, x in options.items()}), call(**options))


def test_streams(tmp_path):
    pytest.importorskip("diffusers", reason="stories need the extra [model]")
    from memflow import MemFlowPipeline

    pipe = MemFlowPipeline.from_preset("storybook")
    n = np.int64
    memory = replace(pipe.memory_config, top_k=n(3), held_frames=n(6))
    assert type(memory.top_k) is int
    sizes = {"height": n(pipe.config.height), "width": n(pipe.config.width), "seed": n(3)}
    stream = pipe.stream(["bo, a red ball, waits on the beach."], seconds_per_prompt=n(1), memory=memory, **sizes)
    next(stream)
    stream.save(tmp_path / "a.state")  # a file holds no numbers of numpy
    again = pipe.resume(tmp_path / "a.state")
    assert torch.equal(next(again).latents, next(stream).latents)


def test_integrations():
    diffusers = pytest.importorskip("diffusers", reason="needs the extra [model]")
    from memflow import MemoryConfig
    from memflow.integrations import StreamingAttention

    sizes = {"num_attention_heads": 2, "attention_head_dim": 24, "ffn_dim": 96, "num_layers": 1, "text_dim": 32}
    streaming = StreamingAttention(diffusers.WanTransformer3DModel(**sizes), MemoryConfig())
    streaming.open(np.int64(1), np.int64(8), np.int64(8))
    assert streaming.size == (1, 8, 8)
    assert {type(number) for number in streaming.size} == {int}

"""A user's file, which type checkers read and nobody runs: every public name has its type. See test_types.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from typing_extensions import assert_type

from memflow import Chunk, ChunkDriver, MemFlowError, MemFlowPipeline, MemoryConfig, MemorySnapshot, Stream, __version__
from memflow.integrations import StreamingAttention, patch, unpatch
from memflow.memory import FrameMemory, make_memory
from memflow.memory.attention import attend_with_memory
from memflow_kernels import (
    Pool,
    available_backends,
    block_causal_table,
    cover_frames,
    frame_means,
    memory_attention,
    merge_attention,
    prompt_relevance,
    qk_norm_rope,
    qk_norm_rope_write,
    replace_frame,
    rotate_keys,
    rotate_keys_write,
    select_frames,
    use_backend,
)


def ops(query: Tensor, key: Tensor, weight: Tensor, slots: Tensor) -> None:
    assert_type(decorated(key, 4), Tensor)
    assert_type(memory_attention(query, key, key, tokens_per_frame=4), Tensor)
    assert_type(memory_attention(query, key, key, tokens_per_frame=4, return_lse=False), Tensor)
    out, lse = memory_attention(query, key, key, tokens_per_frame=4, layout="bhld", return_lse=True)
    assert_type(merge_attention(out, lse, out, lse), tuple[Tensor, Tensor])
    mean = frame_means(key, 4)
    assert_type(mean, Tensor)
    assert_type(prompt_relevance(query, key, tokens_per_frame=4, aggregate="softmax"), Tensor)
    assert_type(select_frames(query, mean, 2), Tensor)
    assert_type(cover_frames(query, mean, 2, weight), Tensor)
    assert_type(block_causal_table(9, 3, local=6, sink=1), Tensor)
    pool = Pool.zeros(1, 15, 24, heads=4, head_dim=32, dtype=torch.bfloat16, device="cpu")
    assert_type(pool, Pool)
    assert_type(pool.key, Tensor)
    assert_type(pool.slots, int)
    turned = qk_norm_rope(query, key, weight_q=weight, weight_k=weight, eps=1e-6, grid=(2, 3), start_frame=0)
    assert_type(turned, tuple[Tensor, Tensor])
    written = qk_norm_rope_write(
        query, key, key, weight_q=weight, weight_k=weight, eps=1e-6, grid=(2, 3), start_frame=slots, pool=pool,
        slots=slots,
    )  # fmt: skip
    assert_type(written, Tensor)
    with_mean = qk_norm_rope_write(
        query, key, key, weight_q=weight, weight_k=weight, eps=1e-6, grid=(2, 3), start_frame=0, pool=pool, slots=slots,
        query_mean=True,
    )  # fmt: skip
    assert_type(with_mean, tuple[Tensor, Tensor])
    assert_type(rotate_keys(key, slots, tokens_per_frame=4), Tensor)
    rotate_keys_write(key, mean, slots, pool=pool)
    replace_frame(pool, slots, slots)
    with use_backend("torch"):
        assert_type(available_backends(), dict[str, str | None])


@use_backend("torch")
def decorated(query: Tensor, tokens: int) -> Tensor:
    return frame_means(query, tokens)


def story(pipe: MemFlowPipeline) -> Tensor:
    assert_type(MemFlowPipeline.from_preset("storybook", dtype=torch.float32), MemFlowPipeline)
    assert_type(MemFlowPipeline.from_pretrained("folder", dtype=torch.float32), MemFlowPipeline)
    memory = replace(pipe.memory_config, top_k=3)
    assert_type(memory, MemoryConfig)
    assert_type(memory.top_k, int | None)
    stream = pipe.stream(["bo, a red ball, waits."], seconds_per_prompt=1.5, memory=memory, seed=[1])
    assert_type(stream, Stream)
    for chunk in stream:
        assert_type(chunk, Chunk)
        assert_type(chunk.prompts, list[str])
    snapshot = stream.snapshot()
    assert_type(snapshot, MemorySnapshot)
    held: NDArray[Any] = snapshot.held
    print(held, __version__)
    stream.send("bo jumps.")
    stream.save("a.state")
    try:
        assert_type(pipe.resume("a.state"), Stream)
    except MemFlowError as error:
        print(error)
    return pipe(["bo, a red ball, waits."], seconds_per_prompt=1.5).frames


def engine(model: nn.Module, streaming: StreamingAttention, latents: Tensor) -> None:
    assert_type(patch(model, check_calls=2), list[str])
    unpatch(model)
    driver: ChunkDriver = streaming
    driver.prompt(latents)
    assert_type(driver.denoise(latents, 1000.0), Tensor)
    driver.keep(latents)
    memory = make_memory(
        MemoryConfig(), layers=1, batch=1, heads=2, head_dim=24, grid=(2, 3), dtype=torch.float32, device="cpu"
    )
    assert_type(memory, FrameMemory)
    step = memory.pass_over(0, 3, None)
    assert_type(attend_with_memory(latents, latents, latents, step, 0), Tensor)
    memory.end_chunk(0)

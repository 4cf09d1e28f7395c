"""Calls of every op at real sizes, named by what they are: what ahead-of-time compilation goes through.

A kernel or a row of the configuration table that no case reaches fails the test, so that a new one gets its case here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

FULL = 1560  # tokens of a frame at 480 x 832
CASES: dict[str, Callable] = {}


def states(tokens, heads=12, head_dim=128, dtype=torch.bfloat16, batch=1, gap=0):
    """[B, L, H, D] as a range of a longer buffer; with a gap between the heads nothing is aligned."""
    return torch.empty((batch, tokens + 16, heads, head_dim + gap), dtype=dtype, device="meta")[:, 16:, :, :head_dim]


def numbers(*shape, dtype=torch.int32):
    return torch.empty(shape, dtype=dtype, device="meta")


def means(frames, heads=12, head_dim=128, batch=1):
    return numbers(batch, frames, heads, head_dim, dtype=torch.float32)


def case(name: str, **sizes):
    """Register a function of (kernels, **sizes) under `name`."""

    def register(function):
        CASES[name] = lambda kernels: function(kernels, **sizes)
        return function

    return register


@case("frame_means bf16", frames=9)
@case("frame_means fp32 D=20", frames=3, heads=3, head_dim=20, dtype=torch.float32, gap=3)
def frame_means(kernels, frames, **options):
    kernels.frame_means(states(frames * FULL, **options), FULL)


@case("select_frames bf16", frames=6)
@case("select_frames fp16 D=24", frames=40, heads=3, head_dim=24, dtype=torch.float16)
def select_frames(kernels, frames, heads=12, head_dim=128, dtype=torch.bfloat16):
    query = states(3 * FULL, heads, head_dim, dtype)
    kernels.select_frames(query, means(frames, heads, head_dim), 3, numbers(1, frames, dtype=torch.bool), None)
    kernels.select_frames(query, means(frames, heads, head_dim), 3, None, 128)


@case("rotate_keys bf16")
@case("rotate_keys fp32 D=20", heads=3, head_dim=20, dtype=torch.float32, gap=3)
def rotate_keys(kernels, heads=12, head_dim=128, dtype=torch.bfloat16, gap=0):
    turning = head_dim - 4 * (head_dim // 6)
    key, still = (states(15 * FULL, heads, size, dtype, 30, gap) for size in (head_dim, turning))
    kernels.rotate_keys(key, numbers(30, 15), FULL, turning, 10000.0)
    still_mean, mean = (means(15, heads, head_dim, batch=30) for _ in range(2))
    kernels.rotate_keys_write(still, still_mean, numbers(9, dtype=torch.int64), 10000.0, key, mean)


@case("relevance bf16", heads=12, head_dim=128, dtype=torch.bfloat16)
@case("relevance fp32", heads=12, head_dim=128, dtype=torch.float32)
@case("relevance fp16 D=24", heads=3, head_dim=24, dtype=torch.float16)
@case("relevance bf16 D=256", heads=3, head_dim=256, dtype=torch.bfloat16)
@case("relevance fp32 D=256", heads=3, head_dim=256, dtype=torch.float32)
def relevance(kernels, heads, head_dim, dtype):
    text, key = states(512, heads, head_dim, dtype, batch=30), states(6 * FULL, heads, head_dim, dtype, batch=30)
    mask = numbers(30, 512, dtype=torch.bool)
    kernels.prompt_relevance_mean(text, means(6, heads, head_dim, batch=30), mask, 0.1)
    kernels.prompt_relevance_token(text, means(24, heads, head_dim, batch=30), mask, 0.1)
    kernels.prompt_relevance_softmax(text, key, mask, FULL, 0.1)
    kernels.prompt_relevance_softmax_backward(means(6)[:, :, 0, 0], text, key, None, FULL, 0.1)


@case("cover_frames bf16", frames=24)
@case("cover_frames fp32", frames=200, dtype=torch.float32)
@case("cover_frames fp16", frames=5000, dtype=torch.float16)
def cover_frames(kernels, frames, dtype=torch.bfloat16):
    row = [numbers(1, size, dtype=torch.float32) for size in (512, frames)]
    kernels.cover_frames(numbers(1, 512, frames, dtype=dtype), row[0], 6, row[1])


@case("qk_norm_rope bf16", heads=12, head_dim=128, dtype=torch.bfloat16)
@case("qk_norm_rope fp32", heads=12, head_dim=128, dtype=torch.float32)
@case("qk_norm_rope bf16 H=40", heads=40, head_dim=128, dtype=torch.bfloat16)
@case("qk_norm_rope fp16 D=24", heads=3, head_dim=24, dtype=torch.float16)
def qk_norm_rope(kernels, heads, head_dim, dtype):
    query, key, value = (states(3 * FULL, heads, head_dim, dtype) for _ in range(3))
    weights = [numbers(heads * head_dim, dtype=dtype)] * 2
    place = (1e-6, 30, 52, 7, None)
    start = (1e-6, 30, 52, 0, numbers(1, dtype=torch.int64))
    kernels.qk_norm_rope(query, key, *weights, *place)
    kernels.qk_norm_rope_backward(query, key, query, key, *weights, *place)
    pool = (states(15 * FULL, heads, head_dim, dtype), states(15 * FULL, heads, head_dim, dtype))
    write = (query, key, value, *weights, *start, *pool, means(15, heads, head_dim), numbers(3))
    for query_mean in (False, True):
        kernels.qk_norm_rope_write(*write, query_mean)


@case("replace_frame bf16")
@case("replace_frame fp32 D=20", heads=3, head_dim=20, dtype=torch.float32, gap=3)
def replace_frame(kernels, heads=12, head_dim=128, **options):
    key, value = (states(15 * FULL, heads, head_dim, batch=30, **options) for _ in range(2))
    kernels.replace_frame(key, value, means(15, heads, head_dim, batch=30), numbers(30), numbers(30))


@case("merge_attention bf16", head_dim=128, dtype=torch.bfloat16)
@case("merge_attention fp32 D=20", head_dim=20, dtype=torch.float32)
def merge_attention(kernels, head_dim, dtype):
    part = states(3 * FULL, 12, head_dim, dtype), numbers(1, 12, 3 * FULL, dtype=torch.float32)
    kernels.merge_attention(*part, *part)
    kernels.merge_attention_backward(*part, *part, *part)


@case("attention bf16 D=64", head_dim=64, dtype=torch.bfloat16)
@case("attention bf16 D=128", head_dim=128, dtype=torch.bfloat16)
@case("attention fp16 D=128", head_dim=128, dtype=torch.float16)
@case("attention bf16 D=256", head_dim=256, dtype=torch.bfloat16)
@case("attention bf16 D=80", head_dim=80, dtype=torch.bfloat16)
@case("attention fp32 D=128", head_dim=128, dtype=torch.float32)
@case("attention fp32 D=64", head_dim=64, dtype=torch.float32)
@case("attention fp32 D=256", head_dim=256, dtype=torch.float32)
@case("attention bf16 D=20 unaligned", head_dim=20, dtype=torch.bfloat16, gap=3)
def attention(kernels, head_dim, dtype, gap=0):
    """3 of 6 frames and 9 more; a choice for every 128 queries; dense; gradients of the first."""
    query, key, value = (states(frames * FULL, 12, head_dim, dtype, gap=gap) for frames in (3, 15, 15))
    scale = head_dim**-0.5
    for frame_table, query_block in ((numbers(1, 12, 3), None), (numbers(1, 12, 37, 3), 128), (None, None)):
        kernels.memory_attention(query, key, value, frame_table, FULL, 6, scale, query_block)
    out, lse = query.contiguous(), numbers(1, 12, 3 * FULL, dtype=torch.float32)
    states_ = (out, lse, query, key, value, out, lse)
    kernels.memory_attention_backward(*states_, numbers(1, 12, 3), FULL, 6, scale, None)


@case("gathered attention bf16")
def gathered_attention(kernels):
    """The other form of activation: its copy, and the launch for the heads with an empty place."""
    query, key, value = states(3 * FULL), states(15 * FULL), states(15 * FULL)
    frame_table, lse = numbers(1, 12, 3), numbers(1, 12, 3 * FULL, dtype=torch.float32)
    kernels.gather.gather_frames(key, value, frame_table, FULL, 6)
    sizes = (frame_table, FULL, 6, 0.1, None)
    kernels.attention.launch_forward(query, key, value, *sizes, query.contiguous(), lse, only_incomplete=True)

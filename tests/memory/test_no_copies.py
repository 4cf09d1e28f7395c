"""The cache is never cloned, rolled, concatenated or gathered: bytes moved by one attention layer, counted op by op.

Unit u, as in docs/memory.md: one frame of K or V of one layer, read or written.
"""

from __future__ import annotations

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanAttention

from memflow.memory import MemoryConfig, Prompt, make_memory
from memflow.models.wan.attention import MemorySelfAttention
from memflow_kernels.testing import Traffic

BATCH, HEADS, DIM, GRID = 1, 12, 24, (7, 9)  # beyond the sizes at which a small call copies all it sees
TOKENS = GRID[0] * GRID[1]
UNIT = TOKENS * HEADS * DIM * 4  # bytes of a frame of K in float32

# What the layer computes, as opposed to moves: linears, attention, and the arithmetic of norm and rotation.
COMPUTED = {
    "addmm", "mm", "bmm", "dot", "linear", "_scaled_dot_product_flash_attention_for_cpu",
    "mul", "div", "add", "sub", "addcmul", "lerp", "log", "pow", "rsqrt", "sqrt", "reciprocal", "mean", "sum", "square",
    "linalg_vector_norm", "cos", "sin", "polar", "exp", "sigmoid", "logaddexp", "logsumexp", "neg", "sort", "arange",
    "view_as_complex", "view_as_real", "maximum", "isinf", "eq", "lt", "ge", "any", "all", "outer", "ones", "zeros",
}  # fmt: skip


def copies(traffic: Traffic, unit: int = UNIT) -> dict[str, float]:
    """Units moved per operation by what is not computation; a copy reads as much as it writes."""
    moved: dict[str, float] = {}
    for name, written in traffic.written:
        name = name.split("::")[1].rstrip("_")
        if name not in COMPUTED:
            moved[name] = moved.get(name, 0) + 2 * written / unit
    return moved


def layer_after(chunks: int, config: MemoryConfig, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    attn = WanAttention(HEADS * DIM, HEADS, DIM, 1e-6).to(dtype)
    memory = make_memory(config, layers=1, batch=BATCH, heads=HEADS, head_dim=DIM, grid=GRID, dtype=dtype, device="cpu")
    key = torch.randn(1, BATCH, 6, HEADS, DIM, dtype=dtype)
    prompt = Prompt(key, key, torch.ones(BATCH, 6, dtype=torch.bool))
    processor = MemorySelfAttention(0)
    hidden = torch.randn(BATCH, 3 * TOKENS, HEADS * DIM, dtype=dtype)
    for chunk in range(chunks):
        memory.update(3 * chunk, prompt)
        step = memory.pass_over(3 * chunk, 3, prompt)
        processor.bind(step, clean=False)
        processor(attn, hidden, rotary_emb=step)
        memory.end_chunk(3 * chunk)
    return attn, memory, prompt, processor, hidden


MOVED = [  # units of the dtype's own: docs/memory.md, What it moves
    (torch.float32, None, 12),
    (torch.float32, 3, 12 + 4 * 3),
    (torch.float32, 1, 12 + 4 * 1),
    (torch.bfloat16, None, 70),
    (torch.bfloat16, 3, 130),
    (torch.bfloat16, 1, 122),
]


@pytest.mark.parametrize(("dtype", "top_k", "units"), MOVED, ids=str)
@torch.no_grad()
def test_a_denoising_pass_moves_the_new_keys_and_what_is_activated(dtype, top_k, units):
    attn, memory, prompt, processor, hidden = layer_after(12, MemoryConfig(top_k=top_k), dtype)
    memory.update(36, prompt)
    step = memory.pass_over(36, 3, prompt)
    assert step.end_slot - step.first_slot == 15, "bank, sink and window are full"
    with Traffic() as traffic:
        processor(attn, hidden, rotary_emb=step)
    unit = UNIT * dtype.itemsize // torch.float32.itemsize
    assert sum(copies(traffic, unit).values()) <= units + 0.5, copies(traffic, unit)
    largest = max(written for _, written in traffic.written)
    if dtype == torch.float32:
        assert largest <= 3.2 * UNIT, "something larger than the chunk was made"


@torch.no_grad()
def test_an_update_moves_one_frame():
    _, memory, prompt, _, _ = layer_after(12, MemoryConfig())
    with Traffic() as traffic:
        memory.update(36, prompt)
    assert 4 <= sum(copies(traffic).values()) <= 4.5, copies(traffic)


@torch.no_grad()
def test_relative_positions_cost_a_pass_nothing_and_a_chunk_what_turns_with_time():
    config = MemoryConfig(positions="relative")
    attn, memory, prompt, processor, hidden = layer_after(12, config)
    with Traffic() as traffic:
        memory.update(36, prompt)
    # One frame moves (4 u). Of all 15 frames the channels that turn with time, 8 of 24, are read and written; of the
    # frame that moves too, but an index_put counts as all 15. The means of so small frames are another 2 u.
    assert sum(copies(traffic).values()) <= 4 + 8 / 24 * 2 * (15 + 15 + 1) + 3, copies(traffic)
    step = memory.pass_over(36, 3, prompt)
    processor.bind(step._replace(unplaced=()), clean=False)  # as a denoising pass does
    with Traffic() as traffic:
        processor(attn, hidden, rotary_emb=step)
    assert sum(copies(traffic).values()) <= 12.5, copies(traffic)


@torch.no_grad()
def test_recall_moves_what_is_not_shown_yet():
    _, memory, prompt, _, _ = layer_after(12, MemoryConfig(policy="diverse", held_frames=5))
    memory.update(36, prompt)
    with Traffic() as traffic:
        memory.recall(prompt)
    assert sum(copies(traffic).values()) <= 0.5, "all that is chosen was shown already"
    with Traffic() as traffic:
        memory.recall(prompt._replace(key=-prompt.key))
    assert 4 <= sum(copies(traffic).values()) <= 3 * 4 + 0.5, copies(traffic)


@torch.no_grad()
def test_the_counter_sees_copies():
    """One layer's cache of 12 frames, cloned and concatenated as in the published code."""
    cache = torch.randn(1, 12 * TOKENS, HEADS, DIM)
    with Traffic() as traffic:
        cache.clone()
        torch.cat([cache[:, :TOKENS], cache[:, TOKENS:]], dim=1)
        cache[:, :TOKENS].copy_(cache[:, -TOKENS:])
        cache.transpose(1, 2).unflatten(2, (12, TOKENS))
    assert copies(traffic) == {"clone": 24, "cat": 24, "copy": 2}

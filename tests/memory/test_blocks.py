"""Activation by blocks smaller than a frame, chosen by blocks of queries: against an attention told slowly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from memflow import MemFlowError
from memflow.memory import MemoryConfig, Prompt, make_memory
from memflow.memory.attention import attend_with_memory
from memflow.memory.places import place_keys
from memflow_bench.untrained import noise_pipeline

HEADS, DIM, GRID, CHUNK, LAYERS = 2, 24, (3, 5), 3, 2
TOKENS, ROW = 15, 5
SETTINGS = {"seconds_per_prompt": 2.25, "height": 32, "width": 32, "seed": 4}


def memory_of(config: MemoryConfig):
    sizes = {"layers": LAYERS, "batch": 2, "heads": HEADS, "head_dim": DIM, "grid": GRID}
    memory = make_memory(config, **sizes, dtype=torch.float32, device="cpu")
    text = torch.randn(2, LAYERS, 2, 4, HEADS, DIM)
    return memory, Prompt(*text, mask=torch.ones(2, 4, dtype=torch.bool))


def slow(query, key, value, candidates: int, block: int, keep: int, query_block: int):
    """[L, H, D] in float64 for one batch row: key, value [M, H, D], of which the first `candidates` compete."""
    out = torch.empty(query.shape, dtype=torch.float64)
    query, key, value = query.double(), key.double(), value.double()
    for head in range(HEADS):
        means = key[:candidates, head].unflatten(0, (-1, block)).mean(1)
        for first in range(0, len(query), query_block):
            asking = query[first : first + query_block, head]
            chosen = (means @ asking.mean(0)).topk(keep).indices
            seen = [*(int(b) * block + i for b in chosen for i in range(block)), *range(candidates, len(key))]
            weights = (asking @ key[seen, head].T * DIM**-0.5).softmax(-1)
            out[first : first + query_block, head] = weights @ value[seen, head]
    return out


@pytest.mark.parametrize("query_block", [None, ROW, 7])
@pytest.mark.parametrize("positions", ["absolute", "relative"])
@pytest.mark.parametrize(
    ("fields", "block", "keys"),
    [
        ({"activated": 20, "activation_block": ROW}, ROW, lambda candidates: 20),
        ({"activated": 0.4, "activation_block": 3}, 3, lambda candidates: 3 * round(0.4 * candidates * TOKENS / 3)),
        ({"top_k": 2, "activation_block": 1}, 1, lambda candidates: 30),
        ({"activated": 0.4}, TOKENS, lambda candidates: TOKENS * round(0.4 * candidates)),
    ],
    ids=["rows", "share", "top_k", "frames"],
)
def test_each_head_attends_to_the_blocks_of_its_choice(fields, block, keys, positions, query_block):
    torch.manual_seed(0)
    base = {"policy": "fifo", "held_frames": 4, "bank_frames": 2, "positions": positions}
    memory, prompt = memory_of(MemoryConfig(**base, **fields, query_block=query_block))
    compared = 0
    for chunk in range(9):
        start = CHUNK * chunk
        memory.update(start, prompt)
        for _ in range(2):
            step = memory.pass_over(start, CHUNK, prompt)
            for layer in range(LAYERS):
                query, key, value = torch.randn(3, 2, CHUNK * TOKENS, HEADS, DIM)
                out = attend_with_memory(query, key, value, step, layer, rotated=False)
                candidates = step.candidates
                if not candidates or keys(candidates) >= candidates * TOKENS:
                    continue
                places = (step.start_frame + torch.arange(CHUNK))[:, None]
                query = place_keys(query.unflatten(1, (CHUNK, -1)), places).flatten(1, 2)
                slots = slice(step.first_slot * TOKENS, step.end_slot * TOKENS)
                for row in range(2):
                    seen = step.pools[layer].key[row, slots], step.pools[layer].value[row, slots]
                    keep = keys(candidates) // block
                    whole = query_block or CHUNK * TOKENS
                    expected = slow(query[row], *seen, candidates * TOKENS, block, keep, whole)
                    torch.testing.assert_close(out[row].double(), expected, rtol=0, atol=5e-6)
                compared += 1
        memory.end_chunk(start)
    assert compared >= 20


def test_the_means_kept_are_those_of_what_attention_sees():
    """At a prompt switch too, where frames are encoded again before the memory is brought up to date."""
    torch.manual_seed(1)
    memory, prompt = memory_of(MemoryConfig(positions="relative", activated=10, activation_block=ROW))
    for chunk in range(8):
        memory.update(CHUNK * chunk, prompt)
        step = memory.pass_over(CHUNK * chunk, CHUNK, prompt)
        for layer in range(LAYERS):
            seen = (step.first_slot + step.candidates) * TOKENS
            first = step.first_slot * TOKENS
            if step.candidates:
                means = step.pools[layer].key[:, first:seen].unflatten(1, (-1, ROW)).mean(2)
                kept = step.block_means[layer][:, first // ROW : seen // ROW]
                torch.testing.assert_close(kept, means, rtol=0, atol=1e-6)
            attend_with_memory(*torch.randn(3, 2, CHUNK * TOKENS, HEADS, DIM), step, layer, rotated=False)


@pytest.mark.parametrize("positions", ["absolute", "relative"])
def test_a_sink_that_ends_within_a_chunk_has_means_when_frames_are_encoded_again(positions):
    """The chunk just made wrote its last frame after the memory had been brought up to date for it."""
    torch.manual_seed(2)
    fields = {"sink_frames": 4, "activated": 10, "activation_block": ROW}
    memory, prompt = memory_of(MemoryConfig(positions=positions, **fields))
    for start in (0, CHUNK):
        memory.update(start, prompt)
        step = memory.pass_over(start, CHUNK, prompt)
        for layer in range(LAYERS):
            attend_with_memory(*torch.randn(3, 2, CHUNK * TOKENS, HEADS, DIM), step, layer, rotated=False)
        memory.end_chunk(start)
    memory.switch_prompt(2 * CHUNK, prompt)
    step = memory.pass_over(*memory.recache_span(2 * CHUNK), prompt)
    assert step.candidates == 4 and step.chooses
    first, seen = (slot * TOKENS for slot in (step.first_slot, step.first_slot + step.candidates))
    for layer in range(LAYERS):
        means = step.pools[layer].key[:, first:seen].unflatten(1, (-1, ROW)).mean(2)
        kept = step.block_means[layer][:, first // ROW : seen // ROW]
        torch.testing.assert_close(kept, means, rtol=0, atol=1e-6)


@pytest.mark.parametrize("positions", ["absolute", "relative"])
@pytest.mark.parametrize("fields", [{"activated": 1.0, "activation_block": 2}, {"top_k": 99, "query_block": 3}])
def test_a_stream_that_activates_all_is_dense(toy, positions, fields):
    config = MemoryConfig(policy="original", held_frames=5, positions=positions)
    told = [
        torch.cat([chunk.latents for chunk in toy.stream(["a fox", "an owl", "a fox"], memory=memory, **SETTINGS)], 2)
        for memory in (config, replace(config, **fields))
    ]
    torch.testing.assert_close(told[0], told[1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("positions", ["absolute", "relative"])
def test_resume_is_bit_identical(toy, positions, tmp_path):
    """The state does not hold the means of the blocks, which a prompt switch needs before the next update."""
    blocks = {"activated": 0.5, "activation_block": 2, "query_block": 2}
    config = MemoryConfig(policy="original", held_frames=5, positions=positions, **blocks)
    stream = toy.stream(["a fox", "an owl", "a fox"], memory=config, **SETTINGS)
    for _ in range(6):
        next(stream)
    stream.save(tmp_path / "state")
    dense = toy.stream(["a fox", "an owl", "a fox"], memory=replace(config, **dict.fromkeys(blocks)), **SETTINGS)
    others = list(dense)[6:]
    for there, here, other in zip(toy.resume(tmp_path / "state"), stream, others, strict=True):
        assert torch.equal(there.latents, here.latents) and not torch.equal(here.latents, other.latents)


def test_what_it_takes_is_counted():
    pipeline = noise_pipeline()
    sizes = []
    for config in (MemoryConfig(activated=8), MemoryConfig(activated=8, activation_block=1)):
        memory = pipeline.stream(["a fox"], height=32, width=32, memory=config).memory
        sizes.append(memory.pool.nbytes)
    blocks = memory.pool.block_mean
    assert sizes[1] - sizes[0] == blocks.nbytes == blocks.numel() * 4
    layers, batch, _, heads, head_dim = memory.pool.frame_mean.shape
    assert blocks.shape == (layers, batch, 6 * memory.pool.tokens_per_frame, heads, head_dim)
    assert "block" not in " ".join(memory.state_dict()[0]), "they can be computed from the keys"


def test_a_block_that_does_not_divide_a_frame_is_named():
    with pytest.raises(MemFlowError, match=r"activation_block must divide the 15 tokens of a frame \(3 rows of 5\)"):
        memory_of(MemoryConfig(activated=8, activation_block=4))


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"activated": 0}, "activated must be a whole number of at least 1, got 0"),
        ({"activated": 1.5}, "activated must be above 0 and at most 1.0 where it is a share, got 1.5"),
        ({"activated": float("nan")}, "activated must be above 0"),
        ({"activated": True}, "activated must be a whole number"),
        ({"activated": 0.5, "top_k": 3}, "activated must be None with top_k=3, which says the same, got 0.5"),
        ({"activation_block": 4}, "activation_block=4 needs top_k or activated"),
        ({"query_block": 4}, "query_block=4 needs top_k or activated"),
        ({"top_k": 3, "query_block": 0}, "query_block must be a whole number of at least 1, got 0"),
        ({"published_mode": "single", "top_k": 3, "query_block": 4}, "query_block must be None with published_mode"),
        ({"published_mode": "single", "activated": 0.5}, "activated must be None with published_mode"),
    ],
)
def test_an_activation_that_cannot_be_is_refused(fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        MemoryConfig(**fields)

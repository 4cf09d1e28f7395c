"""`positions="relative"`: what attention sees depends on distances and slots alone, for as long as a story runs."""

from __future__ import annotations

import pytest
import torch
from slow_memory import SlowAttention, SlowMemory

from memflow.memory import MemoryConfig
from memflow.memory.places import Places, place_keys
from memflow.models.wan.attention import MemorySelfAttention
from memflow_kernels import frame_means, qk_norm_rope

STORY = ["a red boat leaves the harbour", "an owl looks down from the lighthouse"]
CHUNK_SECONDS = 0.75
CONFIGS = {
    "default": MemoryConfig(positions="relative"),
    "activated": MemoryConfig(positions="relative", top_k=2),
    "odd sizes": MemoryConfig(positions="relative", sink_frames=1, window_frames=7, bank_frames=2),
    "no sink": MemoryConfig(positions="relative", sink_frames=0, window_frames=6, bank_frames=4),
}


@pytest.mark.parametrize("places", [Places(3, 3, 9), Places(1, 2, 7), Places(0, 4, 6), Places(5, 0, 3)], ids=str)
def test_places_are_distances_and_bounded(places):
    chunk = 3
    current = places.count - chunk
    for start in range(0, 60, chunk):
        stop = start + chunk
        assert [places.of_window(frame, stop) for frame in range(start, stop)] == [current, current + 1, current + 2]
        window = [places.of_window(frame, stop) for frame in range(stop - places.window, stop)]
        assert window == list(range(places.sink + places.bank, places.count))
        sink = [places.of_sink(frame, stop) for frame in range(min(places.sink, stop))]
        assert sink == [max(current + frame - start, frame) for frame in range(len(sink))]
        assert all(0 <= place < places.count for place in sink) and sink == sorted(set(sink))
    assert [places.of_bank(slot) for slot in range(places.bank)] == list(range(places.sink, places.sink + places.bank))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("head_dim", [24, 128, 4, 2])
def test_placing_rounds_as_often_as_the_op(dtype, head_dim):
    """Keys at place 0, placed, are the keys that the op makes there: equal in half precision."""
    torch.manual_seed(head_dim)
    batch, frames, heads, grid, first = 2, 3, 3, (3, 5), 11
    key = torch.randn(batch, frames * 15, heads, head_dim, dtype=dtype)
    settings = {"weight_q": torch.rand(heads * head_dim, dtype=dtype), "eps": 1e-6, "grid": grid}
    settings["weight_k"] = settings["weight_q"]
    there = qk_norm_rope(key, key, **settings, start_frame=first)[1].unflatten(1, (frames, -1))
    folded = key.unflatten(1, (frames, -1)).flatten(0, 1)
    at_zero = qk_norm_rope(folded, folded, **settings, start_frame=0)[1].unflatten(0, (batch, frames))
    places = torch.arange(first, first + frames)
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14}.get(dtype, 0)
    torch.testing.assert_close(place_keys(at_zero, places[:, None]), there, rtol=0, atol=tolerance)
    mean = frame_means(at_zero.flatten(1, 2), 15)
    placed = place_keys(mean, places)
    torch.testing.assert_close(placed, frame_means(there.flatten(1, 2), 15), rtol=0, atol=max(tolerance, 4e-3))
    for count in range(frames):  # a place per mean, however many there are
        assert torch.equal(place_keys(mean[:, :count], places[:count]), placed[:, :count])


def test_placing_is_differentiable():
    torch.manual_seed(0)
    key = torch.randn(2, 3, 2, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: place_keys(x, torch.tensor([0, 7, 12])), key)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_story_is_the_one_recomputed_from_scratch(toy, config, monkeypatch):
    """Ten chunks and a switch: sink on its way, bank filling and replaced, window encoded again."""
    settings = {"seconds_per_prompt": 5 * CHUNK_SECONDS, "height": 32, "width": 32, "memory": config}
    fast = toy.stream(STORY, **settings)
    latents = torch.cat([chunk.latents for chunk in fast], 2)
    if config == MemoryConfig(positions="relative"):
        absolute = toy.stream(STORY, **settings | {"memory": MemoryConfig()})
        other = torch.cat([chunk.latents for chunk in absolute], 2)
        assert (other - latents).abs().max() > 0.01, "positions make no difference here, so that nothing is shown"
    slow = toy.stream(STORY, **settings)
    slow.driver.memory = SlowMemory(config, len(toy.transformer.blocks), slow.memory.grid, slow.memory.pool)
    monkeypatch.setattr(SlowAttention, "memory", slow.memory, raising=False)
    context = toy.transformer.rope
    processors = [SlowAttention(p.layer) if isinstance(p, MemorySelfAttention) else p for p in context.processors]
    monkeypatch.setattr(context, "processors", processors)
    for block, processor in zip(toy.transformer.blocks, processors[::2], strict=True):
        monkeypatch.setattr(block.attn1, "processor", processor)
    expected = torch.cat([chunk.latents for chunk in slow], 2)
    torch.testing.assert_close(latents, expected, rtol=0, atol=2e-4)
    for layer, bank in enumerate(slow.memory.bank):
        held = [bank[slot][0] if slot in bank else -1 for slot in range(config.bank_frames)]
        assert fast.memory.held[layer, 0].tolist() == held


def test_outputs_do_not_change_when_all_frame_numbers_shift(toy):
    """Bit by bit: from chunk 6 on one of the streams believes to be 3 million frames further."""
    config = MemoryConfig(positions="relative", top_k=3)
    settings = {"seconds_per_prompt": 5 * CHUNK_SECONDS, "height": 32, "width": 32, "memory": config}
    near, far = (toy.stream(STORY, **settings) for _ in range(2))
    for _ in range(6):
        assert torch.equal(next(near).latents, next(far).latents)
    for stream in (near, far):
        stream.driver.settle()
    shift = 333_333 * near.config.window_frames  # whole turns of the ring
    far.driver.position += shift // 3
    far.memory.held[far.memory.held >= 0] += shift
    for a, b in zip(near, far, strict=True):
        assert b.start_frame == a.start_frame + shift
        assert torch.equal(a.latents, b.latents)
    assert torch.equal(far.memory.held, near.memory.held + shift)


def test_scores_do_not_age(toy):
    """A frame that stays in the bank keeps its mean, to the last bit."""
    config = MemoryConfig(positions="relative", policy="fifo", bank_frames=4)
    stream = toy.stream(STORY[:1], seconds_per_prompt=16 * CHUNK_SECONDS, height=32, width=32, memory=config)
    seen: dict[int, torch.Tensor] = {}
    for _ in stream:
        means = stream.memory.pool.means(0, 4)
        for slot, frame in enumerate(stream.memory.held[0, 0].tolist()):
            if frame >= 0:
                assert torch.equal(seen.setdefault(frame, means[:, :, slot].clone()), means[:, :, slot])
    assert len(seen) > 6


def drift(toy, chunks: int) -> tuple[list[float], list[float]]:
    """Norms of the latents and of the keys attended to, chunk by chunk."""
    config = MemoryConfig(positions="relative", policy="diverse", top_k=3)
    prompts = [f"prompt number {i}" for i in range(chunks // 10)]
    stream = toy.stream(prompts, seconds_per_prompt=10 * CHUNK_SECONDS, height=32, width=32, memory=config)
    latents, keys = [], []
    for chunk in stream:
        assert torch.isfinite(chunk.latents).all()
        latents.append(float(chunk.latents.norm()))
        keys.append(float(stream.memory.pool.key.norm()))
    return latents, keys


@pytest.mark.slow
def test_a_long_stream_stays_sane(toy):
    latents, keys = drift(toy, 5000)
    assert len(latents) == 5000
    for norms, first in ((latents, latents[:40]), (keys, keys[8:40])):  # by chunk 8 every slot is filled
        spread = max(first) - min(first)
        assert min(first) - spread <= min(norms[-40:]) and max(norms[-40:]) <= max(first) + spread

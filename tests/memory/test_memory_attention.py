"""`attend_with_memory`, the entry for engines without a module, and a model that is not Wan on top of it."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

from memflow.memory import MemoryConfig, Prompt, make_memory
from memflow.memory.attention import attend_with_memory
from memflow.memory.places import Rotation, place_keys
from memflow.stream.chunks import ChunkDriver

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_model.py"
HEADS, DIM, GRID, CHUNK = 2, 24, (1, 7), 3
TOKENS = GRID[0] * GRID[1]
TURN = Rotation(channels=10, theta=50.0)


def memory_of(config: MemoryConfig, rotation: Rotation | None = TURN, layers: int = 1):
    sizes = {"layers": layers, "batch": 2, "heads": HEADS, "head_dim": DIM, "grid": GRID}
    memory = make_memory(config, **sizes, dtype=torch.float32, device="cpu", rotation=rotation)
    for buffer in (memory.pool.key, memory.pool.value):
        buffer.fill_(float("nan"))  # what nobody has written is not to be read
    text = torch.randn(2, layers, 2, 4, HEADS, DIM)
    return memory, Prompt(*text, mask=torch.ones(2, 4, dtype=torch.bool))


def softmax_attention(query, key, value):
    """In float64: query [B, L, H, D] over all of key."""
    query, key, value = (x.double().transpose(1, 2) for x in (query, key, value))
    return ((query @ key.mT * DIM**-0.5).softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("rotated", [True, False], ids=["rotated", "not rotated"])
def test_while_nothing_has_left_it_is_causal_attention_over_all_frames(rotated):
    torch.manual_seed(0)
    memory, prompt = memory_of(MemoryConfig(bank_frames=2, window_frames=9, sink_frames=3))
    keys, values = [], []
    for chunk in range(4):
        start = CHUNK * chunk
        memory.update(start, prompt)
        for clean in (False, True):
            query, key, value = torch.randn(3, 2, CHUNK * TOKENS, HEADS, DIM)
            out = attend_with_memory(query, key, value, memory.pass_over(start, CHUNK, prompt), 0, rotated=rotated)
            if not rotated:
                places = torch.arange(start, start + CHUNK)[:, None]
                query, key = (place_keys(x.unflatten(1, (CHUNK, -1)), places, TURN).flatten(1, 2) for x in (query, key))
            expected = softmax_attention(query, torch.cat([*keys, key], 1), torch.cat([*values, value], 1))
            torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-6)
            if clean:
                keys.append(key)
                values.append(value)
        memory.end_chunk(start)


def test_a_frame_without_a_slot_is_attended_from_nowhere_and_overwrites_nothing():
    """A call longer than the window: its first frames are not kept."""
    torch.manual_seed(1)
    memory, prompt = memory_of(MemoryConfig(sink_frames=0, window_frames=3, policy="none"))
    step = memory.pass_over(0, 5, prompt)
    assert step.slots.tolist() == [-1, -1, 2, 0, 1]
    query, key, value = torch.randn(3, 2, 5 * TOKENS, HEADS, DIM)
    out = attend_with_memory(query, key, value, step, 0)
    kept = slice(2 * TOKENS, None)
    torch.testing.assert_close(out.double(), softmax_attention(query, key[:, kept], value[:, kept]), rtol=0, atol=2e-6)


def test_with_relative_positions_every_frame_is_turned_to_its_place():
    """Sink and window, before anything enters the bank; the places as `Places` has them."""
    torch.manual_seed(2)
    memory, prompt = memory_of(MemoryConfig(positions="relative", bank_frames=2))
    for buffer in (memory.pool.key, memory.pool.value):
        buffer.zero_()  # `place` turns slots that nobody has written, too
    keys, values, places = [], [], memory.pool.places
    for chunk in range(4):
        start, stop = CHUNK * chunk, CHUNK * (chunk + 1)
        memory.update(start, prompt)
        query, key, value = torch.randn(3, 2, CHUNK * TOKENS, HEADS, DIM)
        out = attend_with_memory(query, key, value, memory.pass_over(start, CHUNK, prompt), 0, rotated=False)
        memory.end_chunk(start)
        keys += key.unflatten(1, (CHUNK, -1)).unbind(1)
        values.append(value)
        own = torch.tensor([[places.of_window(frame, stop)] for frame in range(start, stop)])
        seen = [places.of_sink(f, stop) if f < 3 else places.of_window(f, stop) for f in range(stop)]
        placed = place_keys(torch.stack(keys, 1), torch.tensor(seen)[:, None], TURN).flatten(1, 2)
        query = place_keys(query.unflatten(1, (CHUNK, -1)), own, TURN).flatten(1, 2)
        expected = softmax_attention(query, placed, torch.cat(values, 1))
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-6)


def test_what_does_not_fit_is_refused():
    memory, prompt = memory_of(MemoryConfig(positions="relative"))
    step = memory.pass_over(0, CHUNK, prompt)
    query, key, value = torch.randn(3, 2, CHUNK * TOKENS, HEADS, DIM)
    with pytest.raises(ValueError, match="rotated must be False with positions='relative'"):
        attend_with_memory(query, key, value, step, 0)
    with pytest.raises(ValueError, match=r"key must be \[B, F\*N, H, D\] = \[2, 21, 2, 24\], got \[2, 14, 2, 24\]"):
        attend_with_memory(query, key[:, :14], value, step, 0, rotated=False)
    still, prompt = memory_of(MemoryConfig(), rotation=None)
    with pytest.raises(ValueError, match=r"rotated must be True .*rotation=None"):
        attend_with_memory(query, key, value, still.pass_over(0, CHUNK, prompt), 0, rotated=False)
    with pytest.raises(ValueError, match="positions must be 'absolute' for a model whose keys do not turn"):
        memory_of(MemoryConfig(positions="relative"), rotation=None)


def test_another_model_is_driven_as_wan_is_and_resumes_bit_by_bit():
    """examples/own_model.py: other rotation, other norm, other text; an interrupted story goes on as the whole one."""
    example = runpy.run_path(str(EXAMPLE))
    torch.manual_seed(3)
    model, config = example["OwnModel"](), MemoryConfig(bank_frames=2, top_k=2, positions="relative", policy="diverse")
    prompts, noise = torch.randn(3, 1, 5, 32), torch.randn(9, 1, 4, 3, 6, 6)

    def tell(driver, chunks):
        made = []
        for chunk in chunks:
            if chunk % 3 == 0:
                driver.prompt(prompts[chunk // 3])
            clean = noise[chunk] - driver.denoise(noise[chunk], 1000.0)
            driver.keep(clean)
            made.append(clean)
        return made

    whole = tell(ChunkDriver(model, config), range(9))
    first = ChunkDriver(model, config)
    tell(first, range(5))
    tensors, counters = first.state_dict()
    second = ChunkDriver(model, config)
    second.open(1, 6, 6)
    second.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()}, counters)
    for a, b in zip(tell(second, range(5, 9)), whole[5:], strict=True):
        assert torch.equal(a, b)
    assert second.snapshot().held.shape == (3, 1, 2)

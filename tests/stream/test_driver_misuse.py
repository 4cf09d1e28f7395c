"""ChunkDriver as people call it by mistake: a sentence, and the chunk goes on as if nothing had been."""

import re

import pytest
import torch
from torch import nn

from memflow import MemFlowError
from memflow.integrations import StreamingAttention

SHAPE = (1, 192, 3, 8, 8)


@pytest.fixture
def streaming(toy):
    torch.manual_seed(0)
    streaming = StreamingAttention(toy.transformer)
    streaming.prompt(torch.randn(1, 5, streaming.model.text_dim))
    return streaming


def test_a_timestep_of_a_scheduler_is_a_number(streaming):
    """`for timestep in scheduler.timesteps` gives tensors without dimensions, often of whole numbers."""
    latents = torch.randn(SHAPE)
    expected = streaming.denoise(latents, 500.0)
    for same in (500, torch.tensor(500.0), torch.tensor(500), torch.tensor([500.0])):
        assert torch.equal(streaming.denoise(latents, same), expected)


@pytest.mark.parametrize(
    ("timestep", "said"),
    [
        (None, "timestep must be a number or a tensor, got NoneType"),
        ("500", "timestep must be a number or a tensor, got str"),
        (True, "timestep must be a number or a tensor, got bool"),
        (torch.nan, "timestep must be from 0 .clean. to 1000, got nan"),
        (-1, "timestep must be from 0 .clean. to 1000, got -1"),
        (torch.tensor(1001), "timestep must be from 0 .clean. to 1000, got 1001"),
        (torch.ones(3), r"timestep must be one number, or a tensor \[B\] = \[1\], got \[3\]"),
    ],
)
def test_a_wrong_timestep_is_named_before_the_chunk_begins(streaming, timestep, said):
    with pytest.raises(MemFlowError, match=said):
        streaming.denoise(torch.randn(SHAPE), timestep)
    assert not streaming.in_hand


def test_latents_that_are_no_floating_point_numbers_are_named(streaming):
    for call in (streaming.keep, lambda latents: streaming.denoise(latents, 500.0)):
        with pytest.raises(MemFlowError, match=r"latents must be floating-point numbers, got torch\.int64"):
            call(torch.zeros(SHAPE, dtype=torch.int64))
        with pytest.raises(MemFlowError, match=r"latents must be a torch\.Tensor, got ndarray"):
            call(torch.zeros(SHAPE).numpy())
    assert not streaming.in_hand


def test_a_wrong_prompt_is_named_and_the_one_in_force_stays(streaming):
    latents = torch.randn(SHAPE)
    streaming.denoise(latents, 500.0)
    streaming.keep(latents)
    dim = streaming.model.text_dim
    text = torch.randn(1, 5, dim)
    for arguments, said in (
        ((None,), "embeds must be a torch.Tensor"),
        ((text[:0],), r"embeds must be \[B, T"),
        ((text, [True] * 5), "mask must be a torch.Tensor"),
        ((text.repeat(2, 1, 1),), rf"embeds must be \[1, T, {dim}\], one text for each story"),
    ):
        with pytest.raises(MemFlowError, match=said):
            streaming.prompt(*arguments)
    assert streaming.denoise(latents, 500.0).shape == latents.shape


def test_there_is_no_state_without_a_memory(streaming):
    with pytest.raises(MemFlowError, match="state_dict: there is no memory yet; call open"):
        streaming.state_dict()
    with pytest.raises(MemFlowError, match="load_state_dict: there is no memory yet; call open"):
        streaming.load_state_dict({}, {"position": 0})


@pytest.mark.parametrize("position", [-1, 2**48, 1.0, "3", None])
def test_a_position_is_a_whole_number(streaming, position):
    streaming.open(1, 8, 8)
    with pytest.raises(ValueError, match=re.escape(f"position must be a whole number, got {position!r}")):
        streaming.load_state_dict({}, {"position": position})


def test_a_state_of_the_beginning_is_one(streaming):
    streaming.open(1, 8, 8)
    tensors, counters = streaming.state_dict()
    streaming.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()}, counters)
    assert streaming.position == 0


@pytest.mark.parametrize("size", [(0, 8, 8), (1, -8, 8), (1, 8.0, 8)])
def test_a_size_is_whole_numbers_above_0(streaming, size):
    with pytest.raises(MemFlowError, match="latents: B, h and w must be whole numbers of at least 1, got"):
        streaming.open(*size)


def test_another_module_is_no_transformer():
    with pytest.raises(MemFlowError, match="transformer must be a WanTransformer3DModel, got Linear"):
        StreamingAttention(nn.Linear(2, 2))


SPOILED = {  # a state's tensors and counters -> what load_state_dict says of them
    "position": lambda tensors, counters: counters.update(position=-1),
    "a counter": lambda tensors, counters: counters.update(bank_used=10**6),
    "a tensor is gone": lambda tensors, counters: tensors.pop("memory.shown"),
    "another tensor": lambda tensors, counters: tensors.update(more=torch.zeros(1)),
    "history": lambda tensors, counters: tensors.update(history=tensors["history"][:, :, :-1]),
    "no prompt": lambda tensors, counters: [tensors.pop(name) for name in ("text.embeds", "text.mask")],
    "a prompt without its mask": lambda tensors, counters: tensors.pop("text.mask"),
    "a prompt of another width": lambda tensors, counters: tensors.update({"text.embeds": torch.zeros(1, 2, 3)}),
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_a_state_that_is_refused_leaves_a_driver_at_its_beginning(toy, spoil):
    def told(streaming, chunks):
        torch.manual_seed(1)
        flows = []
        for _ in range(chunks):
            latents = torch.randn(SHAPE)
            flows.append(streaming.denoise(latents, 500.0))
            streaming.keep(latents)
        return flows

    embeds = torch.randn(1, 5, toy.transformer.config.text_dim)
    first, second = (StreamingAttention(toy.transformer) for _ in range(2))
    first.prompt(embeds)
    expected = told(first, 3)
    tensors, counters = first.state_dict()
    state = {name: tensor.clone() for name, tensor in tensors.items()}, dict(counters)
    going_on = told(first, 2)
    second.prompt(embeds)
    told(second, 2)
    spoiled = dict(state[0]), dict(state[1])
    spoil(*spoiled)
    with pytest.raises(ValueError):
        second.load_state_dict(*spoiled)
    assert second.position == 0 and second.history is None and not second.in_hand
    with pytest.raises(MemFlowError, match="which prompt"):
        second.denoise(torch.randn(SHAPE), 500.0)
    second.prompt(embeds)
    for ours, theirs in zip(told(second, 3), expected, strict=True):
        assert torch.equal(ours, theirs)
    second.load_state_dict(*state)
    for ours, theirs in zip(told(second, 2), going_on, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("extra", [{"name": 3}, {1: "text"}, ["name"], "name", {"path": None}])
def test_what_comes_back_as_extra_is_text(toy, tmp_path, extra):
    stream = toy.stream(["bo, a red star, jumps on the beach."], seconds_per_prompt=0.8)
    next(stream)
    with pytest.raises(MemFlowError, match="extra must be texts by name, got"):
        stream.save(tmp_path / "state", extra)
    assert not (tmp_path / "state").exists()
    stream.save(tmp_path / "state", {})

"""StreamingAttention: the loop is the user's, the latents are those of MemFlowPipeline."""

from __future__ import annotations

import copy

import pytest
import torch

from memflow import MemFlowError, MemoryConfig
from memflow.integrations import StreamingAttention
from memflow_bench.untrained import noise_pipeline

STORY = ["a red boat", "an owl"]
MEMORY = MemoryConfig(top_k=2, bank_frames=2)


@pytest.mark.parametrize("memory", [MEMORY, MemoryConfig.published(record_interval=1)], ids=["own", "published"])
def test_a_loop_of_ones_own_makes_what_the_pipeline_makes(toy, memory):
    stream = toy.stream(STORY, seconds_per_prompt=4 * 0.75, height=32, width=32, memory=memory)
    expected = torch.cat([chunk.latents for chunk in stream], dim=2)

    helper = toy.stream(STORY, height=32, width=32)
    schedule, shape = toy.schedule, helper.latent_shape
    streaming, made = StreamingAttention(toy.transformer, memory), []
    for number in range(8):
        if number % 4 == 0:
            embeds, mask = toy.encode((STORY[number // 4],))
            streaming.prompt(embeds, mask)
        latents = helper.noise(shape)
        for index, timestep in enumerate(schedule.timesteps):
            clean = schedule.clean(index, latents, streaming.denoise(latents, timestep))
            if index + 1 < len(schedule):
                latents = schedule.add_noise(index + 1, clean, helper.noise(shape))
        streaming.keep(clean)
        made.append(clean)
    torch.testing.assert_close(torch.cat(made, dim=2), expected, rtol=0, atol=1e-5)
    assert streaming.start_frame == 24
    assert streaming.snapshot().window == list(range(15, 24))


def test_the_mask_is_where_the_embeds_are_not_zero(toy):
    streaming = StreamingAttention(toy.transformer)
    embeds = torch.randn(1, 5, toy.transformer.config.text_dim)
    embeds[:, 3:] = 0
    streaming.prompt(embeds)
    assert streaming.coming.prompt.mask.tolist() == [[True, True, True, False, False]]


def test_remove_gives_the_transformer_its_attention_back():
    transformer = noise_pipeline().transformer
    before = [type(processor) for processor in transformer.attn_processors.values()]
    StreamingAttention(transformer).remove()
    assert [type(processor) for processor in transformer.attn_processors.values()] == before


def test_what_is_wrong_is_named(toy):
    with pytest.raises(MemFlowError, match="memory must be a MemoryConfig, got dict"):
        StreamingAttention(toy.transformer, {})
    streaming = StreamingAttention(toy.transformer)
    latents = torch.zeros(1, 192, 3, 8, 8)
    with pytest.raises(MemFlowError, match=r"Call prompt\(embeds\) before the first chunk"):
        streaming.denoise(latents, 1000)
    dim = toy.transformer.config.text_dim
    with pytest.raises(MemFlowError, match=rf"embeds must be \[B, T, {dim}\], got \[4, {dim}\]"):
        streaming.prompt(torch.zeros(4, dim))
    with pytest.raises(MemFlowError, match=r"mask must be \[B, T\] = \[1, 4\], got \[1, 5\]"):
        streaming.prompt(torch.zeros(1, 4, dim), torch.ones(1, 5))
    streaming.prompt(torch.zeros(1, 4, dim))
    for shape in ((1, 192, 2, 8, 8), (2, 192, 3, 8, 8), (1, 16, 3, 8, 8), (192, 3, 8, 8)):
        with pytest.raises(MemFlowError, match=r"latents must be \[1, 192, 3, h, w\], got"):
            streaming.denoise(torch.zeros(shape), 1000)
    with pytest.raises(MemFlowError, match="h and w must be multiples of 2 and 2, got 7 and 8"):
        streaming.denoise(torch.zeros(1, 192, 3, 7, 8), 1000)
    with pytest.raises(MemFlowError, match="no chunk has been kept"):
        streaming.snapshot()
    streaming.denoise(latents, 1000)
    with pytest.raises(MemFlowError, match="chunk 0 is under way"):
        streaming.prompt(torch.zeros(1, 4, dim))
    streaming.keep(latents)
    with pytest.raises(MemFlowError, match=r"it began with \(1, 8, 8\) \(B, h, w\), not \(1, 8, 16\)"):
        streaming.keep(torch.zeros(1, 192, 3, 8, 16))


def test_weights_that_change_after_a_state_was_taken_are_those_of_the_prompt_too(toy):
    """The clean pass is made by then: only the prompt's keys and values are left to be made anew."""
    transformer = copy.deepcopy(toy.transformer)
    first, second = StreamingAttention(transformer), StreamingAttention(transformer)
    first.prompt(torch.randn(1, 5, transformer.config.text_dim, generator=torch.Generator().manual_seed(1)))
    latents = torch.randn(1, transformer.config.in_channels, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    before = first.denoise(latents, 500.0)
    first.keep(latents)
    tensors, counters = first.state_dict()
    state = {name: tensor.clone() for name, tensor in tensors.items()}
    with torch.no_grad():
        transformer.blocks[0].attn2.to_k.weight.mul_(-2)
        transformer.blocks[0].attn2.to_v.weight.mul_(3)
    second.open(1, 8, 8)
    second.load_state_dict(state, counters)
    after = first.denoise(latents, 500.0)
    assert torch.equal(after, second.denoise(latents, 500.0)) and not torch.equal(after, before)


def test_weights_that_change_before_the_clean_pass_are_those_of_its_prompt_too(toy):
    transformer = copy.deepcopy(toy.transformer)
    embeds = torch.randn(1, 5, transformer.config.text_dim, generator=torch.Generator().manual_seed(1))
    latents = torch.randn(1, transformer.config.in_channels, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    pools = []
    for change in (True, False):  # the second one has never seen the weights before
        streaming = StreamingAttention(transformer)
        streaming.prompt(embeds)
        streaming.denoise(latents, 500.0)
        streaming.keep(latents)
        if change:
            with torch.no_grad():
                transformer.blocks[0].attn2.to_v.weight.mul_(-3)
        tensors, _ = streaming.state_dict()
        pools.append([tensor.clone() for name, tensor in tensors.items() if "pool" in name])
    assert all(torch.equal(one, other) for one, other in zip(*pools, strict=True))

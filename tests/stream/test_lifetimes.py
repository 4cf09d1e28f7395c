"""What belongs to whom and for how long: a caller's chunks, a stream's pool, the text encoder, noise on its way."""

from __future__ import annotations

import pytest
import torch

from memflow.integrations import StreamingAttention
from memflow.memory import MemoryConfig
from memflow.models.wan.text import PromptCache
from memflow.stream.sampler import to_device
from memflow_bench.untrained import noise_pipeline

STORY = ["a red boat", "an owl"]
SMALL = {"height": 32, "width": 32, "seconds_per_prompt": 2 * 0.75}


def test_latents_belong_to_the_caller(toy):
    expected = [chunk.latents for chunk in toy.stream(STORY, **SMALL)]
    for chunk, latents in zip(toy.stream(STORY, **SMALL), expected, strict=True):
        assert torch.equal(chunk.latents, latents)
        chunk.latents.fill_(float("nan"))


def test_latents_that_a_loop_of_ones_own_keeps_stay_its_own(toy):
    streaming = StreamingAttention(toy.transformer)
    streaming.prompt(torch.ones(1, 4, toy.transformer.config.text_dim))
    latents = torch.ones(1, 192, 3, 8, 8)
    streaming.keep(latents)
    latents.zero_()
    assert streaming.history.eq(1).all()


@pytest.mark.parametrize("positions", ["absolute", "relative"])
def test_a_model_holds_no_stream_between_its_calls(toy, positions):
    stream = toy.stream(STORY, memory=MemoryConfig(top_k=2, positions=positions), **SMALL)
    list(stream)
    stream.driver.settle()
    held = {
        (type(processor).__name__, name)
        for processor in toy.transformer.rope.processors
        for name, value in vars(processor).items()
        if isinstance(value, torch.Tensor | tuple)
    }
    assert held == set()


def test_all_noise_of_a_chunk_is_under_way_before_its_first_step(toy, monkeypatch):
    stream, events = toy.stream(STORY, **SMALL), []
    randn, denoise = torch.randn, stream.driver.denoise
    monkeypatch.setattr(torch, "randn", lambda *args, **kw: events.append("noise") or randn(*args, **kw))
    stream.driver.denoise = lambda *args: events.append("step") or denoise(*args)
    next(stream)
    steps = len(toy.schedule)
    assert events == ["noise"] * steps + ["step"] * steps


def test_noise_does_not_make_a_gpu_wait(monkeypatch):
    class Gpu:
        type = "cuda"

    moves = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: moves.append("pinned") or self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device, **how: moves.append((device.type, how)) or self)
    noise = torch.randn(2, 3)
    assert to_device(noise, Gpu()) is noise
    assert moves == ["pinned", ("cuda", {"non_blocking": True})]


def test_an_encoder_that_a_sent_prompt_loaded_goes_again():
    pipeline, loaded = noise_pipeline(), []
    encoder = pipeline.text_encoder
    pipeline.prompts = PromptCache(
        pipeline.tokenizer, lambda: loaded.append(1) or encoder, pipeline.config.text_length, dtype=torch.float32
    )
    stream = pipeline.stream(STORY, **SMALL)
    next(stream)
    assert len(loaded) == 1 and pipeline.prompts._encoder is None
    stream.send("a lighthouse")
    list(stream)
    assert len(loaded) == 2, "the planned prompts were encoded together"
    assert pipeline.prompts._encoder is None

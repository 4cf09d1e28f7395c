from itertools import pairwise

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from transformers import ByT5Tokenizer, UMT5EncoderModel

from memflow import MemFlowPipeline
from memflow_bench.untrained import PixelShuffleCodec, build

MODELS = ("transformer", "text_encoder", "vae")


def states(components) -> dict[str, torch.Tensor]:
    return {f"{name}.{key}": tensor for name in MODELS for key, tensor in components[name].state_dict().items()}


def test_builds_the_components_of_a_pipeline():
    components = build()
    assert {name: type(part) for name, part in components.items()} == {
        "transformer": WanTransformer3DModel,
        "text_encoder": UMT5EncoderModel,
        "tokenizer": ByT5Tokenizer,
        "vae": PixelShuffleCodec,
        "scheduler": FlowMatchEulerDiscreteScheduler,
    }
    assert not any(components[name].training for name in MODELS)
    assert components["transformer"].config.in_channels == components["vae"].channels


def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(5)
    first = states(build())
    torch.rand(3)
    before = torch.get_rng_state()
    second = states(build())
    assert torch.equal(torch.get_rng_state(), before)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = states(build(seed=1))
    assert not torch.equal(
        first["transformer.blocks.0.ffn.net.2.weight"], other["transformer.blocks.0.ffn.net.2.weight"]
    )


def test_pipeline_survives_saving(toy, tmp_path):
    toy.save_pretrained(tmp_path)
    loaded = MemFlowPipeline.from_pretrained(tmp_path)
    expected, found = states(toy.components), states(loaded.components)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert loaded.scheduler.config.shift == toy.scheduler.config.shift
    assert loaded.tokenizer("a fox\u00e9").input_ids == toy.tokenizer("a fox\u00e9").input_ids


def colours(video: torch.Tensor) -> torch.Tensor:
    return video.float().mean((0, 1, 2, 3))


def test_pictures_are_worth_watching(toy):
    """Neither saturated nor grey, alike in time, and coloured by the prompt."""
    prompts = ["A red fox runs through the snow at dawn.", "A quiet blue lake under the stars.", "sunny beach"]
    videos = [toy.stream([prompt], seconds_per_prompt=3.0, seed=1) for prompt in prompts]
    videos = [torch.cat([chunk.frames for chunk in stream], dim=1) for stream in videos]
    for video in videos:
        pixels = video.float()
        assert 20 < pixels.std() < 90
        assert ((pixels < 3) | (pixels > 252)).float().mean() < 0.1
        late = pixels[:, -12:]
        assert (late[:, 1:] - late[:, :-1]).abs().mean() < 40  # snow: 75
    distances = [(colours(a) - colours(b)).abs().max() for a, b in pairwise(videos)]
    assert min(distances) > 20

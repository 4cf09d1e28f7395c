"""What may not change in a model under a stream: refused by name, and the stream goes on when it is undone."""

from __future__ import annotations

import diffusers
import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from memflow import MemFlowError
from memflow_bench.untrained import noise_pipeline

STORY, SMALL = ["a red boat", "an owl"], {"height": 32, "width": 32, "seconds_per_prompt": 3 * 0.75}


@pytest.fixture
def pipe():
    return noise_pipeline()


def test_another_dtype_is_refused_and_the_stream_goes_on_in_its_own(pipe, tmp_path):
    stream = pipe.stream(STORY, **SMALL)
    next(stream)
    pipe.transformer.to(torch.bfloat16)
    for step in (lambda: next(stream), lambda: stream.save(tmp_path / "state")):
        with pytest.raises(MemFlowError, match=r"dtype has changed .* from torch.float32 to torch.bfloat16"):
            step()
    assert not list(tmp_path.iterdir())
    pipe.transformer.to(torch.float32)
    assert next(stream).index == 1


def test_another_device_is_refused(pipe):
    stream = pipe.stream(STORY, **SMALL)
    next(stream)
    table = pipe.transformer.scale_shift_table
    pipe.transformer.scale_shift_table = torch.nn.Parameter(table.detach().to("meta"))
    with pytest.raises(MemFlowError, match="device has changed under a stream, from cpu to meta"):
        next(stream)
    pipe.transformer.scale_shift_table = table
    pipe.transformer.blocks.to("meta")
    with pytest.raises(MemFlowError, match="fetched layer by layer"):
        next(stream)


def test_other_attention_processors_are_refused(pipe):
    stream = pipe.stream(STORY, **SMALL)
    next(stream)
    pipe.transformer.blocks[1].attn2.set_processor(WanAttnProcessor())
    with pytest.raises(MemFlowError, match="attention processors have been replaced since the stream began"):
        next(stream)
    next(pipe.stream(STORY, **SMALL))  # a new stream sets its own


HOOKS = {
    "PyramidAttentionBroadcastConfig": {"spatial_attention_block_skip_range": 2, "current_timestep_callback": int},
    "MagCacheConfig": {"num_inference_steps": 6, "mag_ratios": [1.0] * 6},
    "FirstBlockCacheConfig": {},
    "FasterCacheConfig": {"current_timestep_callback": int},
    "TaylorSeerCacheConfig": {"use_lite_mode": True},  # its default finds nothing to hook here
    "TextKVCacheConfig": {},
    "SeaCacheConfig": {},
}


@pytest.mark.parametrize("live", [False, True], ids=["before", "between chunks"])
@pytest.mark.parametrize("name", HOOKS)
def test_caches_are_refused(pipe, name, live):
    if not hasattr(diffusers, name):
        pytest.skip(f"this diffusers has no {name}")
    stream = pipe.stream(STORY, **SMALL)
    expected = [next(stream).latents] if live else []
    try:
        pipe.transformer.enable_cache(getattr(diffusers, name)(**HOOKS[name]))
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        pytest.skip(f"diffusers cannot set {name} on this transformer: {error}")
    with pytest.raises(MemFlowError, match=r"a stream cannot use the hook '\w+'.*disable_cache"):
        next(stream) if live else pipe.stream(STORY, **SMALL)
    pipe.transformer.disable_cache()
    if expected:
        assert next(stream).index == 1, "no chunk is lost by a refusal"


def test_a_layer_that_is_skipped_otherwise_is_noticed(pipe):
    """No hook of diffusers, a patched forward."""
    stream = pipe.stream(STORY, **SMALL)
    pipe.transformer.blocks[2].forward = lambda hidden_states, *rest: hidden_states
    with pytest.raises(MemFlowError, match="the attention of layer 2 was not called"):
        next(stream)

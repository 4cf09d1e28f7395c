"""Weights that are not where they compute: which kinds of offloading are served, and on which device."""

from __future__ import annotations

import pytest
import torch

from memflow import MemFlowError
from memflow.decoders import use_decoder
from memflow.decoders.taehv import TinyVideoDecoder
from memflow.integrations import StreamingAttention
from memflow_bench.untrained import noise_pipeline


class Offloaded:
    """Stands in for accelerate's hook of `enable_model_cpu_offload`: the weights come to the CPU to compute."""

    execution_device = "cpu"

    def pre_forward(self, module, *args, **kwargs):
        return args, kwargs


def test_a_loop_of_ones_own_computes_where_the_weights_come_to(monkeypatch):
    def run(transformer):
        streaming = StreamingAttention(transformer)
        streaming.prompt(torch.ones(1, 4, transformer.config.text_dim))
        noisy = torch.randn(1, 192, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        flow = streaming.denoise(noisy, 1000)
        streaming.keep(flow)
        return flow

    transformer = noise_pipeline().transformer
    expected = run(transformer)
    transformer._hf_hook = Offloaded()
    monkeypatch.setattr(type(transformer), "device", torch.device("meta"))  # where they are between the calls
    assert torch.equal(run(transformer), expected)


def test_a_tiny_decoder_computes_where_the_pipeline_does(monkeypatch, tmp_path):
    pipeline = noise_pipeline()
    model = TinyVideoDecoder(latent_channels=192, channels=(8, 8, 8), grow=(2, 2))
    monkeypatch.setattr(TinyVideoDecoder, "from_original", lambda path, dtype: model)
    monkeypatch.setattr(type(pipeline), "_execution_device", torch.device("meta"))
    use_decoder(pipeline, tmp_path)
    assert pipeline.vae.device.type == "meta"


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
@pytest.mark.parametrize("installed", [False, True], ids=["before", "after"])
def test_group_offloading_is_refused(kind, installed):
    pipeline = noise_pipeline()
    if installed:
        next(pipeline.stream(["a red boat"], height=32, width=32))
    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    pipeline.transformer.enable_group_offload(torch.device("cpu"), offload_type=kind, **blocks)
    with pytest.raises(MemFlowError, match=r"group offloading.*enable_model_cpu_offload"):
        pipeline.stream(["a red boat"], height=32, width=32)

"""The recorded runs of the published model, by two processes."""

from __future__ import annotations

import sys
from pathlib import Path

import together
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler

from memflow import MemFlowPipeline
from memflow.models.wan.checkpoints import load_transformer

GOLDEN = str(Path(__file__).parents[1] / "golden")


def replayed() -> dict[str, float]:
    """Largest difference of the latents of every run."""
    sys.path.insert(0, GOLDEN)
    import golden
    import test_models as runs

    config, recorded = runs.SECTION["config"], runs.tensors()
    weights = golden.directory() / next(name for name in runs.SECTION["files"] if "weights" in name)
    pipe = MemFlowPipeline(
        tokenizer=None,
        text_encoder=None,
        transformer=load_transformer(weights, num_attention_heads=config["heads"]),
        vae=AutoencoderKLWan(base_dim=8, z_dim=config["in_channels"], num_res_blocks=1),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=config["timestep_shift"]),
        denoising_steps=config["denoising_steps"],
    )
    pipe.enable_parallelism()
    found = {}
    for name, case in runs.CASES.items():
        expected = recorded[f"{name}.latents"]
        stream = runs.recorded_stream(pipe, {**config, **case["spec"]}, recorded, batch=expected.shape[0])
        latents = torch.cat([chunk.latents for chunk in stream], dim=2).transpose(1, 2)
        found[name] = (latents - expected).abs().max().item() / runs.LATENT_TOLERANCE
    return found


def test_the_recorded_runs():
    for found in together.run(2, replayed):
        assert found and max(found.values()) <= 1, found

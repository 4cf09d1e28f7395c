"""What diffusers and peft bring keeps working on a transformer with a memory: LoRA, fused projections."""

from __future__ import annotations

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from memflow_bench.untrained import noise_pipeline


def first_latents(pipeline) -> torch.Tensor:
    return next(pipeline.stream(["a red boat"], seconds_per_prompt=0.75)).latents


def test_lora(toy, tmp_path):
    plain = first_latents(toy)
    trained = noise_pipeline()
    trained.transformer.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    for name, weight in trained.transformer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05, generator=torch.Generator().manual_seed(0))
    expected = first_latents(trained)
    assert not torch.allclose(expected, plain, atol=1e-2)
    trained.save_lora_weights(tmp_path, transformer_lora_layers=get_peft_model_state_dict(trained.transformer))

    loaded = noise_pipeline()
    loaded.load_lora_weights(tmp_path)
    torch.testing.assert_close(first_latents(loaded), expected, rtol=0, atol=1e-5)
    loaded.fuse_lora()
    torch.testing.assert_close(first_latents(loaded), expected, rtol=0, atol=1e-4)


def test_fused_projections(toy):
    fused = noise_pipeline()
    fused.transformer.fuse_qkv_projections()
    assert hasattr(fused.transformer.blocks[0].attn1, "to_qkv")
    assert hasattr(fused.transformer.blocks[0].attn2, "to_kv")
    torch.testing.assert_close(first_latents(fused), first_latents(toy), rtol=0, atol=1e-5)

"""A streaming generation loop on diffusers alone: WanTransformer3DModel, a scheduler, and MemFlow's memory in between.

Runs anywhere with a tiny random model; with a distilled causal checkpoint pass its folder:

    python examples/diffusers_loop.py [FOLDER of a diffusers transformer]
"""

import sys

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel

from memflow import MemoryConfig
from memflow.integrations import StreamingAttention

if len(sys.argv) > 1:
    transformer = WanTransformer3DModel.from_pretrained(sys.argv[1], torch_dtype=torch.bfloat16)
else:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 24, "ffn_dim": 96, "num_layers": 2, "text_dim": 32}
    transformer = WanTransformer3DModel(**sizes)
transformer.to("cuda" if torch.cuda.is_available() else "cpu").eval()
device = transformer.device

# The noise levels of four-step distilled models: entries 1000, 750, 500 and 250 of the shifted schedule.
table = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=5.0).sigmas
levels = [float(table[1000 - step]) for step in (1000, 750, 500, 250)]

streaming = StreamingAttention(transformer, MemoryConfig(top_k=3))
for chunk in range(6):
    if chunk in (0, 4):  # a prompt, and another one later: embeddings of your text encoder go here
        streaming.prompt(torch.randn(1, 16, transformer.config.text_dim))
    latents = torch.randn(1, transformer.config.in_channels, 3, 8, 8, device=device)
    for number, sigma in enumerate(levels):
        clean = latents - sigma * streaming.denoise(latents, 1000 * sigma)
        if number + 1 < len(levels):
            following = levels[number + 1]
            latents = (1 - following) * clean + following * torch.randn_like(clean)
    streaming.keep(clean)
    print(f"chunk {chunk}: latents of std {clean.std():.2f}; bank holds {streaming.snapshot().held[0, 0].tolist()}")

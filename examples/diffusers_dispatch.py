"""An engine whose attention takes query, key and value: diffusers' own attention processor, with a memory behind it.

WanAttnProcessor projects, norms and rotates as ever and then calls diffusers' attention dispatcher, which here is
`attend_with_memory`. `StreamingAttention`, whose processors are ours, gives the same stream.

    python examples/diffusers_dispatch.py
"""

from unittest import mock

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers import transformer_wan

from memflow import MemoryConfig
from memflow.integrations import StreamingAttention
from memflow.memory import Prompt, make_memory
from memflow.memory.attention import attend_with_memory

HEADS, DIM, LAYERS, CHUNK, GRID, CONFIG = 2, 24, 2, 3, (4, 4), MemoryConfig(top_k=3)


class Remembering(transformer_wan.WanAttnProcessor):
    """The processor of one layer's self-attention, for the pass in hand."""

    def __init__(self, layer: int, step):
        super().__init__()
        self.attention = lambda query, key, value, **_: attend_with_memory(query, key, value, step, layer)

    def __call__(self, *args, **kwargs):
        with mock.patch.object(transformer_wan, "dispatch_attention_fn", self.attention):
            return super().__call__(*args, **kwargs)


def prompt_of(transformer, embeds) -> Prompt:
    """Its keys and values in every layer, by which frames are recalled."""
    text = transformer.condition_embedder.text_embedder(embeds)
    attentions = [block.attn2 for block in transformer.blocks]
    states = [[a.norm_k(a.to_k(text)) for a in attentions], [a.to_v(text) for a in attentions]]
    key, value = (torch.stack(layers).unflatten(-1, (HEADS, DIM)) for layers in states)
    return Prompt(key, value, torch.ones(embeds.shape[:2], dtype=torch.bool))


@torch.no_grad()
def main(chunks: int = 8) -> None:
    torch.manual_seed(0)
    heads = {"num_attention_heads": HEADS, "attention_head_dim": DIM}
    transformer = WanTransformer3DModel(**heads, ffn_dim=96, num_layers=LAYERS, text_dim=32).eval()
    embeds = torch.randn(1, 16, 32)
    noise = torch.randn(chunks, 1, 16, CHUNK, 2 * GRID[0], 2 * GRID[1])  # a token is 2 x 2 latent pixels
    sizes = {"layers": LAYERS, "batch": 1, "heads": HEADS, "head_dim": DIM, "grid": GRID}
    memory, prompt = make_memory(CONFIG, **sizes, dtype=torch.float32, device="cpu"), prompt_of(transformer, embeds)

    def from_start(rope, args, found):  # diffusers counts frames from 0; the chunk's are the last of so many
        longer = args[0].new_empty(1, 1, start + CHUNK, *args[0].shape[3:])
        return tuple(table[:, -found[0].shape[1] :] for table in rope.forward(longer))

    hook, ours = transformer.rope.register_forward_hook(from_start), []
    for start, latents in zip(range(0, chunks * CHUNK, CHUNK), noise, strict=True):
        memory.update(start, prompt)
        for timestep in (1000.0, 0.0):  # one denoising pass and the clean one
            step = memory.pass_over(start, CHUNK, prompt)
            for layer, block in enumerate(transformer.blocks):
                block.attn1.set_processor(Remembering(layer, step))
            latents = latents - timestep / 1000 * transformer(latents, torch.tensor([timestep]), embeds).sample
        memory.end_chunk(start)
        ours.append(latents)
    hook.remove()
    streaming, error = StreamingAttention(transformer, CONFIG), 0.0
    streaming.prompt(embeds)
    for latents, expected in zip(noise, ours, strict=True):
        clean = latents - streaming.denoise(latents, 1000.0)
        streaming.keep(clean)
        error = max(error, (clean - expected).abs().max().item())
    print(f"{chunks} chunks, the bank holds {memory.held[0, 0].tolist()}: the same to 1e-5: {error < 1e-5}")


if __name__ == "__main__":
    main()

"""A stream driven through the published path: the same transformer, prompts and noise, the published cache and bank."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memflow.memory import MemoryConfig, Prompt
from memflow.models.wan.adapter import WanModel
from memflow.stream.sampler import Noise

from .layer import PublishedLayer


class PublishedPass(NamedTuple):
    """One call of the transformer. store: the clean pass keeps its keys and values."""

    layers: list[PublishedLayer]
    prompt: Prompt
    start_frame: int
    store: bool
    top_k: int | None


class Context(nn.Module):
    """Takes the place of the transformer's `rope`: hands the call in progress to every self-attention."""

    def __init__(self):
        super().__init__()
        self.step: PublishedPass | None = None

    def forward(self, hidden_states: Tensor) -> PublishedPass:
        return self.step


class SelfAttention:
    """Processor of one layer's self-attention."""

    def __init__(self, layer: int):
        self.layer = layer
        self.written: tuple[Tensor, Tensor] | None = None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        step, layer = rotary_emb, rotary_emb.layers[self.layer]
        query, key, value = (linear(hidden_states) for linear in (attn.to_q, attn.to_k, attn.to_v))
        weights = attn.norm_q.weight, attn.norm_k.weight
        query, key = layer.norm_rotate(query, key, *weights, attn.norm_q.eps, step.start_frame)
        value = value.unflatten(2, (attn.heads, -1))
        out = layer.attend(query, key, value, start_frame=step.start_frame, store=step.store, top_k=step.top_k)
        if step.store:
            self.written = key, value
        return attn.to_out[0](out.flatten(2))


class CrossAttention:
    """Processor of one layer's cross-attention, over keys and values that were computed once per prompt."""

    def __init__(self, layer: int, context: Context):
        self.layer, self.context = layer, context

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        prompt = self.context.step.prompt
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        key, value = (x[self.layer].transpose(1, 2) for x in (prompt.key, prompt.value))
        return attn.to_out[0](F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class PublishedStream:
    """Chunk after chunk as the published interactive pipeline makes them.

    pipeline: a MemFlowPipeline, whose weights are shared. config: a MemoryConfig, read as the published system's
    sizes. Text comes as embeddings, noise as in `memflow.stream.stream`, so that the latents of both can be compared.
    """

    def __init__(self, pipeline, *, config: MemoryConfig, seeds, height: int, width: int):
        weights = pipeline.transformer
        self.encode = WanModel(weights).encode_prompt
        self.transformer = copy.deepcopy(weights, {id(p): p for p in (*weights.parameters(), *weights.buffers())})
        self.transformer.rope = Context()
        for index, block in enumerate(self.transformer.blocks):
            block.attn1.set_processor(SelfAttention(index))
            block.attn2.set_processor(CrossAttention(index, self.transformer.rope))
        self.config, self.schedule = config, pipeline.schedule
        self.dtype, self.device = weights.dtype, weights.device
        rows, cols = height // pipeline.spatial_factor, width // pipeline.spatial_factor
        patch = weights.config.patch_size
        self.latent_shape = (weights.config.in_channels, config.frames_per_chunk, rows, cols)
        model = weights.config
        self.window = config.sink_frames + config.window_frames
        self.layers = [
            PublishedLayer(
                batch=len(seeds),
                heads=model.num_attention_heads,
                head_dim=model.attention_head_dim,
                grid=(rows // patch[1], cols // patch[2]),
                sink=config.sink_frames,
                window=self.window,
                bank=config.bank_frames,
                dtype=self.dtype,
                device=self.device,
            )
            for _ in range(model.num_layers)
        ]
        self.noise = Noise(seeds)
        self.position = 0
        self.history: Tensor | None = None
        self.prompt: Prompt | None = None
        self.text_known = False

    @torch.no_grad()
    def switch(self, embeds: Tensor, mask: Tensor) -> None:
        """A new prompt from the next chunk on: the newest clean frames are encoded again under it."""
        self.switch_text(embeds, mask)
        self.text_known = False
        start = self.position * self.config.frames_per_chunk
        count = min(self.window, start)
        if count:
            self.maintain()
            self.fix(self.history[:, :, -count:], start - count)

    @torch.no_grad()
    def switch_text(self, embeds: Tensor, mask: Tensor) -> None:
        """Attend to this prompt from now on, and retrieve by it."""
        self.prompt = self.encode(embeds.to(self.device, self.dtype), mask.to(self.device))
        self.text_known = True

    @torch.no_grad()
    def chunk(self) -> Tensor:
        """Clean latents [B, C, F, h, w] of the next chunk."""
        start = self.position * self.config.frames_per_chunk
        self.maintain()
        latents = self.noise(self.latent_shape).to(self.device)
        for index, timestep in enumerate(self.schedule.timesteps):
            flow = self.call(latents, timestep, start, store=False)
            clean = self.schedule.clean(index, latents, flow)
            if index + 1 < len(self.schedule):
                latents = self.schedule.add_noise(index + 1, clean, self.noise(self.latent_shape).to(self.device))
        self.fix(clean, start)
        self.record()
        self.history = clean if self.history is None else torch.cat([self.history, clean], 2)[:, :, -self.window :]
        self.text_known = True
        self.position += 1
        return clean

    def call(self, latents: Tensor, timestep: float, start: int, store: bool) -> Tensor:
        """A whole forward over the frames from `start` on: flow, of the shape of `latents`."""
        self.transformer.rope.step = PublishedPass(self.layers, self.prompt, start, store, self.config.top_k)
        times = torch.full((latents.shape[0],), timestep, dtype=torch.float32, device=latents.device)
        # The prompt's keys and values are computed once, as ours are.
        text = latents.new_empty((latents.shape[0], 0, self.transformer.config.text_dim), dtype=self.dtype)
        return self.transformer(latents.to(self.dtype), times, text, return_dict=False)[0]

    def fix(self, latents: Tensor, start: int) -> None:
        """The clean pass: a whole forward at timestep 0."""
        self.call(latents, 0.0, start, store=True)

    def maintain(self) -> None:
        text = self.prompt.key if self.text_known else torch.zeros_like(self.prompt.key)
        for layer, key in zip(self.layers, text, strict=True):
            layer.bank.maintain(key)

    def record(self) -> None:
        if self.position % self.config.record_interval == 0:
            slots = self.position // self.config.record_interval + 1
            for layer, block in zip(self.layers, self.transformer.blocks, strict=True):
                layer.bank.record(*block.attn1.processor.written, slots)

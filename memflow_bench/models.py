"""Streams to time: whole stories of the toy model, and one chunk of a model of a case's size with random weights."""

from __future__ import annotations

import copy

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from torch import Tensor

from memflow.memory import MemoryConfig
from memflow.stream.pipeline import MemFlowPipeline
from memflow.stream.plan import Plan
from memflow.stream.stream import Stream
from memflow_kernels import frame_means

from .cases import Case
from .published_path.stream import PublishedStream
from .untrained import cast

TEXT_DIM = 4096


def pipeline_of(case: Case, dtype: torch.dtype, device: torch.device) -> MemFlowPipeline:
    """A pipeline whose transformer has the sizes of `case` and random weights; its VAE only gives the factors."""
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(0)
        transformer = WanTransformer3DModel(
            num_attention_heads=case.heads,
            attention_head_dim=case.head_dim,
            ffn_dim=case.ffn,
            num_layers=case.layers,
            text_dim=TEXT_DIM,
        )
        vae = AutoencoderKLWan(base_dim=8, z_dim=16, num_res_blocks=1)
    cast(transformer, dtype)
    return MemFlowPipeline(
        tokenizer=None,
        text_encoder=None,
        transformer=transformer.eval().requires_grad_(False),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=5.0),
    )


def config_of(case: Case, activated: bool, memory: bool = True) -> MemoryConfig:
    return MemoryConfig(
        frames_per_chunk=case.chunk,
        sink_frames=case.sink,
        window_frames=case.window,
        bank_frames=case.bank if memory else 0,
        top_k=case.top_k if activated else None,
        policy="prompt" if memory else "none",
    )


class Middle:
    """The middle of a story: text and frames that both kinds of stream begin with.

    key, value: [layers, B, bank + sink + window, N, H, D] float32 on the CPU, the window oldest first.
    """

    def __init__(self, case: Case, memory: bool, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.bank = case.bank if memory else 0
        frames = self.bank + case.sink + case.window
        size = (case.layers, case.batch, frames, case.tokens, case.heads, case.head_dim)
        self.case = case
        self.key, self.value = (torch.randn(size, generator=generator) for _ in range(2))
        self.embeds = torch.randn(case.batch, case.text_tokens, TEXT_DIM, generator=generator)
        self.mask = torch.ones(case.batch, case.text_tokens, dtype=torch.bool)
        self.position = -(-(case.sink + 2 * case.window) // case.chunk)
        self.size = {"height": case.grid[0] * 16, "width": case.grid[1] * 16}  # patches of 2x2 latent pixels of 8x8

    def ours(self, pipeline: MemFlowPipeline, config: MemoryConfig) -> Stream:
        plan = Plan([], 1)
        plan.current, plan.remaining = ("",) * self.case.batch, 10**6  # its prompt is under way
        stream = Undecoded(pipeline, plan=plan, config=config, seeds=range(self.case.batch), **self.size)
        memory, case = stream.memory, self.case
        first = case.chunk * self.position - case.window
        slots = [*range(self.bank + case.sink), *(memory.pool.slot_of(first + i) for i in range(case.window))]
        for buffer, held in ((memory.pool.key, self.key), (memory.pool.value, self.value)):
            buffer.unflatten(2, (-1, case.tokens))[:, :, slots] = held.to(buffer)
        means = frame_means(memory.pool.key.flatten(0, 1), case.tokens)
        memory.pool.frame_mean.copy_(means.view_as(memory.pool.frame_mean))
        memory.shown[:] = torch.arange(self.bank)
        tensors, counters = memory.state_dict()
        embeds, mask = self.text(pipeline)
        state = {f"memory.{name}": tensor for name, tensor in tensors.items()}
        channels, _, *size = stream.latent_shape
        history = torch.zeros(
            case.batch, channels, case.sink + case.window, *size
        )  # no prompt switches: nobody reads it
        stream.driver.load_state_dict(
            {**state, "text.embeds": embeds, "text.mask": mask, "history": history},
            {**counters, "bank_used": self.bank, "position": self.position},
        )
        return stream

    def published(self, pipeline: MemFlowPipeline, config: MemoryConfig) -> PublishedStream:
        stream = PublishedStream(pipeline, config=config, seeds=range(self.case.batch), **self.size)
        leaving = self.bank + self.case.sink  # the oldest frame of the window is what ours moves into the bank
        for layer, key, value in zip(stream.layers, self.key, self.value, strict=True):
            for name, held in (("key", key.to(layer.key)), ("value", value.to(layer.key))):
                getattr(layer, name).copy_(held[:, self.bank :].flatten(1, 2))
                getattr(layer.bank, name).copy_(held[:, : self.bank].flatten(1, 2))
            layer.held = layer.key.shape[1]
            frames = (x.to(layer.key)[:, leaving] for x in (key, value))
            layer.bank.record(*frames, self.bank + 1)
        stream.position = self.position
        stream.switch_text(*self.text(pipeline))
        return stream

    def text(self, pipeline: MemFlowPipeline) -> tuple[Tensor, Tensor]:
        device = pipeline.transformer.device
        return self.embeds.to(device, pipeline.transformer.dtype), self.mask.to(device)


class Undecoded(Stream):
    """A stream whose latents are not made into pictures."""

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self.decoder.decode = lambda latents: torch.empty(0)


def in_float64(pipeline: MemFlowPipeline) -> MemFlowPipeline:
    """The same pipeline with a transformer of its own, in float64."""
    twin = copy.copy(pipeline)
    twin.transformer = copy.deepcopy(pipeline.transformer).double()
    return twin

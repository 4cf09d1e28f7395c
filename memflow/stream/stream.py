"""A story while it is being told: `Stream` makes one chunk after the other and can be steered, saved and resumed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from memflow.decoders.codec import stream_decoder
from memflow.errors import MemFlowError
from memflow.memory.config import MemoryConfig
from memflow.memory.frames import MemorySnapshot, Pass, Prompt
from memflow.models.wan.attention import head_sizes, install
from memflow.models.wan.graphs import GraphedDenoiser
from memflow.models.wan.passes import denoise, encode_prompt, fix
from memflow.stream.noise import Noise, to_device
from memflow.stream.plan import Plan


@dataclass(frozen=True)
class Chunk:
    """What one step of a stream yields.

    index: number of the chunk. start_frame: number of its first latent frame. prompts: one text per batch row.
    switched: a new prompt starts here. latents: clean, [B, C, F, h, w] float32 on the model's device, the caller's own.
    frames: the video, [B, T, H, W, 3] uint8 on the CPU.
    """

    index: int
    start_frame: int
    prompts: list[str]
    switched: bool
    latents: Tensor
    frames: Tensor


class Stream(Iterator[Chunk]):
    """Chunks of one story, or of a batch of stories that switch prompts together. Made by `MemFlowPipeline.stream`.

    The pass that fixes a chunk's keys and values in the memory is made when the next chunk is asked for, not before:
    a chunk reaches its viewer one pass earlier and the last one needs none.

    position: chunks made. timings: seconds so far in "text", "loop" (the transformer and the memory) and "decode".
    """

    def __init__(
        self, pipeline, *, plan: Plan, config: MemoryConfig, seeds: Sequence[int], height: int, width: int, noise=None
    ):
        self.pipeline = pipeline
        self.plan = plan
        self.config = config
        self.seeds = list(seeds)
        self.height, self.width = height, width
        self.noise = noise or Noise(seeds)
        self.extra: dict[str, str] = {}
        self.position = 0
        self.timings = {"text": 0.0, "loop": 0.0, "decode": 0.0}
        transformer = pipeline.transformer
        install(transformer)
        rows, columns = height // pipeline.spatial_factor, width // pipeline.spatial_factor
        patch = transformer.config.patch_size
        self.memory = config.create(
            **head_sizes(transformer),
            batch=len(self.seeds),
            grid=(rows // patch[1], columns // patch[2]),
            dtype=transformer.dtype,
            device=pipeline._execution_device,
            seeds=self.seeds,
        )
        self.latent_shape = (transformer.config.in_channels, config.frames_per_chunk, rows, columns)
        self.history: Tensor | None = None
        self.embeds: Tensor | None = None
        self.mask: Tensor | None = None
        self.prompt: Prompt | None = None
        self.decoder = stream_decoder(pipeline.vae)
        self.denoise = GraphedDenoiser(transformer) if pipeline.cuda_graphs else partial(denoise, transformer)
        self._unfixed: tuple[Tensor, Pass] | None = None
        self._broken_at: int | None = None

    def __iter__(self) -> Stream:
        return self

    def __len__(self) -> int:
        """Chunks made and still to be made."""
        return self.position + len(self.plan)

    @torch.no_grad()
    def __next__(self) -> Chunk:
        self._refuse_if_broken()
        entry = self.plan.next()
        if entry is None:
            raise StopIteration
        self._broken_at = self.position
        texts, switched = entry
        start = self.position * self.config.frames_per_chunk
        self.settle()
        if switched:
            self._switch(texts, start)
        with self._timed("loop"):
            self.memory.update(start, self.prompt)
            latents = self._denoise(start)
        with self._timed("decode"):
            frames = self.decoder.decode(latents)
        self._broken_at = None
        self.position += 1
        return Chunk(self.position - 1, start, list(texts), switched, latents.clone(), frames)

    def send(self, prompt: str | Sequence[str]) -> None:
        """Switch to `prompt` (one text, or one per batch row) at the next chunk, for as many chunks as any prompt has;
        what is still planned comes after it. Of several prompts sent during one chunk the last counts.
        """
        self.plan.send(self.pipeline.check_prompt(prompt, len(self.seeds)))

    def snapshot(self) -> MemorySnapshot:
        """What the memory holds for the chunk just made. Waits for the device."""
        if self.prompt is None:
            raise MemFlowError("snapshot: no chunk has been made yet")
        return self.memory.snapshot(self.position * self.config.frames_per_chunk, self.prompt)

    @torch.no_grad()
    def settle(self) -> None:
        """Fix the keys and values of the last chunk in the memory, unless that has been done."""
        if self._unfixed is None:
            return
        with self._timed("loop"):
            latents, step = self._unfixed
            fix(self.pipeline.transformer, latents, step)
            self.memory.end_chunk((self.position - 1) * self.config.frames_per_chunk)
            self._unfixed = None

    def save(self, path, extra: dict[str, str] | None = None) -> None:
        """Write the state to one safetensors file, from which `MemFlowPipeline.resume` goes on with identical results.

        extra: texts of the caller's own that come back as `stream.extra`.
        """
        from memflow.stream.saved import save_stream

        self._refuse_if_broken()
        self.settle()
        save_stream(self, path, {**self.extra, **(extra or {})})

    # -- inside ------------------------------------------------------------------------------------------------------

    def set_prompt(self, embeds: Tensor, mask: Tensor) -> None:
        """Attend to a prompt given as text embeddings [B, T, text_dim] and mask [B, T] from now on."""
        self.embeds, self.mask = embeds, mask
        self.prompt = encode_prompt(self.pipeline.transformer, embeds, mask)

    def _switch(self, texts: tuple[str, ...], start: int) -> None:
        with self._timed("text"):
            embeds, mask = self.encode(texts)
        with self._timed("loop"):
            self.set_prompt(embeds, mask)
            self.memory.switch_prompt(start, self.prompt)
            first, count = self.memory.recache_span(start)
            if count:
                step = self.memory.pass_over(first, count, self.prompt)
                fix(self.pipeline.transformer, self._model_input(self.history[:, :, -count:]), step)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Text embeddings [B, T, text_dim] and mask [B, T] of one prompt."""
        pipe = self.pipeline
        if pipe.prompts is not None:  # what is planned too, or every prompt would load the encoder again
            pipe.prompts.prepare([*texts, *(text for planned, _ in self.plan.queue for text in planned)])
        embeds, mask = pipe.encode(texts)
        device = pipe._execution_device
        return embeds.to(device, self.memory.pool.key.dtype), mask.to(device)

    def _denoise(self, start: int) -> Tensor:
        schedule, device = self.pipeline.schedule, self.memory.pool.key.device
        step = self.memory.pass_over(start, self.config.frames_per_chunk, self.prompt)
        # Before the first step: between two of them the host would wait for the device.
        noises = [to_device(self.noise(self.latent_shape), device) for _ in schedule.timesteps]
        latents = noises[0]
        for index, timestep in enumerate(schedule.timesteps):
            flow = self.denoise(self._model_input(latents), timestep, step)
            clean = schedule.clean(index, latents, flow)
            if index + 1 < len(schedule):
                latents = schedule.add_noise(index + 1, clean, noises[index + 1])
        if not torch.isfinite(clean).all():
            raise MemFlowError(
                f"chunk {self.position}: the latents contain NaN or infinity; check the weights and the dtype"
            )
        kept = self.config.sink_frames + self.config.window_frames
        self.history = clean if self.history is None else torch.cat([self.history, clean], dim=2)[:, :, -kept:]
        self._unfixed = (self._model_input(clean), step)
        return clean

    def _model_input(self, latents: Tensor) -> Tensor:
        return latents.to(self.memory.pool.key.dtype)

    def _refuse_if_broken(self) -> None:
        if self._broken_at is not None:
            raise MemFlowError(
                f"the stream was interrupted while it made chunk {self._broken_at}; go on from a saved state"
            )

    @contextmanager
    def _timed(self, name: str):
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.timings[name] += time.perf_counter() - begin

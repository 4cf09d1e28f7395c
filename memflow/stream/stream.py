"""A story while it is made: `Stream` yields one chunk after the other and can be steered, saved and resumed."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from memflow.errors import MemFlowError
from memflow.models.wan.text import token_words
from memflow.modes import own_modes
from memflow.stream.plan import Plan, prompt_texts
from memflow.stream.sampler import Noise, to_device
from memflow.stream.words import called_by

if TYPE_CHECKING:
    from memflow.memory.config import MemoryConfig
    from memflow.memory.frames import FrameMemory
    from memflow.memory.views import MemorySnapshot
    from memflow.stream.chunks import ChunkDriver


@dataclass(frozen=True)
class Chunk:
    """What one step of a stream yields.

    Attributes:
        index: number of the chunk.
        start_frame: number of its first latent frame.
        prompts: one text per batch row.
        switched: a new prompt starts here.
        latents: clean, [B, C, F, h, w] float32 on the model's device, the caller's own.
        frames: the video, [B, T, H, W, 3] uint8 on the CPU. Of several processes that make the story together
            (`MemFlowPipeline.enable_parallelism`) the first has it; in the others T is 0.
    """

    index: int
    start_frame: int
    prompts: list[str]
    switched: bool
    latents: Tensor
    frames: Tensor


class Stream(Iterator[Chunk]):
    """Chunks of one story, or of a batch of stories that switch prompts together. Made by `MemFlowPipeline.stream`.

    `send`, `save` and `snapshot` may be called from another thread; the last two wait for the chunk that is being made.
    Where several processes make the story together all of them take the same chunks, and call `save` and `snapshot`, in
    the same order; `send` is for the first.

    Args:
        pipeline: the `MemFlowPipeline`.
        plan: which prompt rules which chunk.
        config: what is remembered.
        seeds: of the noise, one per story.
        height: of the video, pixels.
        width: of the video, pixels.

    Attributes:
        position: chunks made.
        timings: seconds so far in "text", "loop" (the transformer and the memory) and "decode".
        extra: texts of the caller's own that came with a saved state.
    """

    def __init__(self, pipeline, *, plan: Plan, config: MemoryConfig, seeds: Sequence[int], height: int, width: int):
        self.pipeline = pipeline
        self.plan = plan
        self.config = config
        self.seeds = list(seeds)
        self.height, self.width = height, width
        self.noise = Noise(seeds)
        self.extra: dict[str, str] = {}
        self.timings = {"text": 0.0, "loop": 0.0, "decode": 0.0}
        self.driver: ChunkDriver = pipeline.driver(config, self.seeds, height, width)
        self.latent_shape = (self.driver.model.channels, config.frames_per_chunk, *self.driver.size[1:])
        self.decoder = pipeline.decoder()
        self.ranks = self.driver.model.ranks
        self._lock = threading.RLock()

    def __iter__(self) -> Stream:
        return self

    def __len__(self) -> int:
        """Chunks made and still to be made."""
        return self.position + len(self.plan)

    @property
    def position(self) -> int:
        return self.driver.position

    @property
    def memory(self) -> FrameMemory:
        """What the stream remembers."""
        return self.driver.memory

    def __next__(self) -> Chunk:
        with self._lock, own_modes():
            self._refuse_if_broken()
            self.driver.follow_model()  # before the plan goes on: it may refuse, and the stream go on later
            entry = self._next_entry()
            if entry is None:
                raise StopIteration
            texts, switched = entry
            start = self.driver.start_frame
            try:
                if switched:
                    with self._timed("text"):
                        embeds, mask = self._encode(texts)
                    with self._timed("loop"):
                        self.driver.prompt(embeds, mask)
                with self._timed("loop"):
                    self.driver.begin()
            except BaseException:
                if not self.driver.in_hand:  # the stream can go on, and must not do so under the prompt before
                    self.plan.give_back(switched)
                raise
            with self._timed("loop"):
                latents = self._denoise()
            with self._timed("decode"):
                if self.ranks.first:
                    frames = self.decoder.decode(latents)
                else:
                    frames = torch.empty((len(self.seeds), 0, self.height, self.width, 3), dtype=torch.uint8)
            self.driver.keep(latents)
            return Chunk(self.position - 1, start, list(texts), switched, latents, frames)

    def send(self, prompt: str | Sequence[str]) -> None:
        """Switch to another prompt at the next chunk, for as many chunks as any prompt has; what is still planned comes
        after it. Of several prompts sent during one chunk the last counts.

        Args:
            prompt: one text, or one per story of the batch.

        Raises:
            MemFlowError: not a text, or a blank one.
        """
        texts = prompt_texts(prompt, len(self.seeds))
        if not self.ranks.first:
            raise MemFlowError(f"send: prompts are taken by the first process, not by number {self.ranks.rank}")
        self.plan.send(texts)
        self.pipeline.warn_of_losses(texts)

    def snapshot(self) -> MemorySnapshot:
        """What the memory holds for the chunk just made, and the words that called for it. Waits for the device."""
        with self._lock:  # or it would mix two chunks
            snapshot, length = self.driver.snapshot(), self.pipeline.config.text_length
            words = [token_words(self.pipeline.tokenizer, text, length) for text in self.plan.current]
        return snapshot._replace(words=called_by(snapshot, words))

    def save(self, path: str | Path, extra: dict[str, str] | None = None) -> None:
        """Write the state to one safetensors file, from which `MemFlowPipeline.resume` goes on with identical results.

        Args:
            path: the file; one that is there is replaced when the new one is complete.
            extra: texts of the caller's own that come back as `stream.extra`.

        Raises:
            MemFlowError: the stream was interrupted in a chunk, extra is not texts by name, or the file cannot be
                written.
        """
        from memflow.stream.saved import save_stream

        extra = {} if extra is None else extra
        if not isinstance(extra, Mapping) or not all(isinstance(text, str) for item in extra.items() for text in item):
            raise MemFlowError(f"extra must be texts by name, got {extra!r}")

        with self._lock, own_modes():
            self._refuse_if_broken()
            with self._timed("loop"):
                self.driver.settle()
            save_stream(self, path, {**self.extra, **extra})

    def _next_entry(self) -> tuple[tuple[str, ...], bool] | None:
        """As `Plan.next`; what was sent to the first process rules in all."""
        if self.ranks.size == 1:
            return self.plan.next()
        entry, plan = self.ranks.from_first(lambda: (self.plan.next(), self.plan.to_dict()))
        if not self.ranks.first:
            self.plan = Plan.from_dict(plan)
        return entry

    def _encode(self, texts: Sequence[str]) -> Sequence[Tensor]:
        """Text embeddings [B, T, text_dim] and mask [B, T] of one prompt, made by the first process for all."""
        pipe = self.pipeline

        def encoded() -> tuple[Tensor, Tensor]:
            if pipe.prompts is not None:  # what is planned too, or every prompt would load the encoder again
                pipe.prompts.prepare([*texts, *(text for planned, _ in self.plan.queue for text in planned)])
            return pipe.encode(texts)

        if self.ranks.size == 1:
            return encoded()
        # On the CPU: devices have other numbers in other processes.
        return self.ranks.from_first(lambda: [part.cpu() for part in encoded()])

    def _denoise(self) -> Tensor:
        """Clean latents of the chunk in hand, float32."""
        pipe, device = self.pipeline, self.driver.model.device
        schedule = pipe.schedule if self.position else pipe.first_schedule
        # Before the first step: between two of them the host would wait for the device.
        noises = [to_device(self.noise(self.latent_shape), device) for _ in schedule.timesteps]
        latents = noises[0]
        for index, timestep in enumerate(schedule.timesteps):
            flow = self.driver.denoise(latents, timestep)
            clean = schedule.clean(index, latents, flow)
            if index + 1 < len(schedule):
                latents = schedule.add_noise(index + 1, clean, noises[index + 1])
        if not torch.isfinite(clean).all():
            raise MemFlowError(
                f"chunk {self.position}: the latents contain NaN or infinity; check the weights and the dtype"
            )
        return clean

    def _refuse_if_broken(self) -> None:
        if self.driver.in_hand:
            raise MemFlowError(
                f"the stream was interrupted while it made chunk {self.position}; go on from a saved state"
            )

    @contextmanager
    def _timed(self, name: str):
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.timings[name] += time.perf_counter() - begin

"""The chunk protocol: `ChunkDriver` owns the order in which a model and its memory are called, chunk by chunk.

    prompt -> update -> denoising passes -> keep -> clean pass, and the window encoded again where a prompt switches

It knows no text, no sampler, no video and no model family. Streams, `StreamingAttention` and servers stand on it.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from memflow.errors import MemFlowError
from memflow.memory.attention import Pass
from memflow.memory.config import MemoryConfig
from memflow.memory.frames import FrameMemory, make_memory
from memflow.memory.views import MemorySnapshot
from memflow.modes import own_modes
from memflow.parallel import ALONE
from memflow.stream import given

if TYPE_CHECKING:
    from memflow.models.base import VideoModel


class ChunkDriver:
    """A model that makes video chunk by chunk and remembers.

    `prompt`, then for every chunk `denoise` as often as the sampler likes and `keep` once. The clean pass over a chunk,
    which writes its keys and values for the chunks to come, is made when the next chunk begins: a viewer gets a chunk
    one pass earlier, and the last chunk needs none. Several drivers on one model can take turns.

    Args:
        model: what is driven, a `memflow.models.base.VideoModel`.
        memory: what is held, shown and activated. Its frames_per_chunk is a chunk's length.
        seeds: one per batch row, for policies that draw; zeros where not given.

    Attributes:
        position: chunks kept.
        memory: the `FrameMemory`, made by `open` or with the first chunk.
        history: the latents [B, C, F, h, w] that a prompt switch may encode again.
        in_force: the text of the last chunk, or of the one in hand; None: there is none yet.
        coming: the text from the next chunk on; None: no other.

    Raises:
        MemFlowError: `memory` is no MemoryConfig.
    """

    def __init__(self, model: VideoModel, memory: MemoryConfig, *, seeds: Sequence[int] = ()):
        if not isinstance(memory, MemoryConfig):
            raise MemFlowError(f"memory must be a MemoryConfig, got {type(memory).__name__}")
        self.model, self.config, self.seeds = model, memory, list(seeds)
        self._forget()

    def _forget(self) -> None:
        """The beginning of a video: nothing is held, no size is fixed."""
        self.memory: FrameMemory | None = None
        self.history: Tensor | None = None
        self.position = 0
        self.size: tuple[int, int, int] | None = None
        self.in_force: given.EncodedText | None = None
        self.coming: given.EncodedText | None = None
        self._version: Hashable = None  # of the model that has encoded them
        self._begun = self._ready = -1  # chunk whose preparation began, and the last that it ended for
        self._step: Pass | None = None
        self._unwritten: tuple[Tensor, Pass] | None = None  # the chunk whose clean pass is due

    @property
    def start_frame(self) -> int:
        """Number of the latent frame that the chunk in hand begins with."""
        return self.position * self.config.frames_per_chunk

    @property
    def in_hand(self) -> bool:
        """Whether a chunk has been begun and not been kept."""
        return self._begun == self.position

    def open(self, batch: int, rows: int, columns: int) -> None:
        """Make the memory; the first chunk does so where this was not called.

        Args:
            batch: stories side by side.
            rows: height of the latents.
            columns: width of the latents.

        Raises:
            MemFlowError: a size that does not fit the model, or not the one that the memory was made for.
        """
        size = (batch, rows, columns)
        if self.size == size:
            return
        if self.size is not None:
            raise MemFlowError(f"latents: a stream keeps its size; it began with {self.size} (B, h, w), not {size}")
        batch, rows, columns = size = given.latent_size(size)
        model = self.model
        try:
            grid = model.grid(rows, columns)
        except ValueError as error:
            raise MemFlowError(f"latents: {error}") from None
        sizes = {"layers": model.layers, "heads": model.heads, "head_dim": model.head_dim, "batch": batch}
        with own_modes():
            sizes |= {"grid": grid, "dtype": model.dtype, "device": model.device, "seeds": self.seeds}
            ranks = getattr(model, "ranks", ALONE)  # models of one process need not say so
            self.memory = make_memory(self.config, **sizes, rotation=model.rotation, ranks=ranks)
        self.size = size

    def prompt(self, embeds: Tensor, mask: Tensor | None = None) -> None:
        """Attend to a prompt from the next chunk on.

        Args:
            embeds: [B, T, text_dim], text embeddings, rows of padding zero.
            mask: [B, T], True where a token counts for retrieval; where a row of embeds is not zero if not given.

        Raises:
            MemFlowError: shapes that do not fit, or a chunk that has been begun and not kept.
        """
        given.check_embeds(embeds, mask, self.model.text_dim, self.size and self.size[0])
        if self.in_hand:
            raise MemFlowError(f"prompt: chunk {self.position} is under way under another one; keep it first")
        self.follow_model()
        with own_modes():
            mask = (embeds != 0).any(-1) if mask is None else mask.bool()
            self.coming = given.EncodedText.of(self.model, embeds, mask, copy=True)

    def denoise(self, latents: Tensor, timestep: float | Tensor) -> Tensor:
        """What the model predicts for the noisy chunk in hand.

        Args:
            latents: [B, C, frames_per_chunk, h, w].
            timestep: 0 (clean) to 1000; or a tensor, of that one number or [B], whose range is not checked on a GPU.

        Returns:
            The flow, of the shape, dtype and device of latents.

        Raises:
            MemFlowError: no prompt yet, latents that do not fit, or a chunk that was interrupted.
        """
        given.check_latents(latents)
        timestep = given.one_timestep(timestep, latents.shape[0] if latents.ndim else 1)
        self.begin(latents.shape)
        with own_modes():
            return self.model.denoise(latents.to(self.memory.pool.key), timestep, self._step).to(latents)

    def keep(self, latents: Tensor) -> None:
        """The clean chunk is the result: remember it, and go on to the next.

        Args:
            latents: [B, C, frames_per_chunk, h, w].

        Raises:
            MemFlowError: as `denoise`.
        """
        given.check_latents(latents)
        self.begin(latents.shape)
        with own_modes():
            latents = latents.detach().clone()  # the caller's, who may go on to write into them
            kept = self.config.sink_frames + self.config.window_frames
            history = latents if self.history is None else torch.cat([self.history, latents], dim=2)[:, :, -kept:]
        self.history, self._unwritten, self._step = history, (latents.to(self.memory.pool.key), self._step), None
        self.position += 1

    def begin(self, shape: Sequence[int] | None = None) -> None:
        """Make the memory ready for the chunk in hand, once: `denoise` and `keep` do so. To be called where the time
        that it takes is to be told apart.

        Args:
            shape: of the chunk's latents, where it has not been checked.
        """
        frames, text = self.config.frames_per_chunk, self.coming or self.in_force
        if text is None:
            raise MemFlowError("which prompt? Call prompt(embeds) before the first chunk")
        if shape is not None:
            given.check_shape(shape, (text.mask.shape[0], self.model.channels, frames))
            self.open(shape[0], *shape[3:])
        if self._ready == self.position:
            return
        if self.in_hand:
            raise MemFlowError(f"chunk {self.position} was interrupted while it began; go on from a saved state")
        if self._unwritten is None:
            self.follow_model()
        self.settle()
        self._begun = self.position
        start = self.start_frame
        with own_modes():
            if self.coming is not None:
                self.in_force, self.coming = self.coming, None
                self.memory.switch_prompt(start, self.in_force.prompt)
                first, count = self.memory.recache_span(start)
                if count:  # the frames that stay in the window, under the new prompt
                    step = self.memory.pass_over(first, count, self.in_force.prompt)
                    self.model.write_clean(self.history[:, :, -count:].to(self.memory.pool.key), step)
            self.memory.update(start, self.in_force.prompt)
            self._step = self.memory.pass_over(start, frames, self.in_force.prompt)
        self._ready = self.position

    def settle(self) -> None:
        """Write the keys and values of the last chunk into the memory, unless that has been done."""
        if self._unwritten is None:
            return
        self.follow_model()
        with own_modes():
            self.model.write_clean(*self._unwritten)
            self.memory.end_chunk((self.position - 1) * self.config.frames_per_chunk)
        self._unwritten = None

    def snapshot(self) -> MemorySnapshot:
        """What the memory holds for the chunk just kept. Waits for the device."""
        if self.position == 0:
            raise MemFlowError("snapshot: no chunk has been kept yet")
        with own_modes():
            return self.memory.snapshot(self.start_frame, self.in_force.prompt)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """All that `load_state_dict` needs to go on with identical results: tensors, and whole numbers by name.

        The tensors are the driver's own, which the next chunk writes into: clone what is kept.

        Raises:
            MemFlowError: a chunk has been begun and not kept, or there is no memory yet.
        """
        self._require_memory("state_dict")
        if self.in_hand:
            raise MemFlowError(f"chunk {self.position} is under way: a state is saved between chunks")
        self.settle()
        tensors, counters = self.memory.state_dict()
        tensors = {f"memory.{name}": tensor for name, tensor in tensors.items()}
        for name, text in (("text", self.in_force), ("next", self.coming)):
            if text is not None:
                tensors |= {f"{name}.embeds": text.embeds, f"{name}.mask": text.mask}
        tensors |= {} if self.history is None else {"history": self.history}
        return tensors, {"position": self.position, **counters}

    def load_state_dict(self, tensors: dict[str, Tensor], counters: dict[str, int]) -> None:
        """Go on where `state_dict` was taken.

        Args:
            tensors: as it gave them; on any device. A driver that was opened with the same sizes takes them.
            counters: as it gave them.

        Raises:
            MemFlowError: there is no memory yet.
            ValueError: a state of other sizes or settings, or one that no driver could have given. The driver is as
                `open` left it then, at the beginning of a video.
        """
        self._require_memory("load_state_dict")
        try:
            with own_modes():
                self._load(tensors, counters)
        except BaseException:
            size = self.size
            self._forget()  # the room of the old one before the new one is made
            self.open(*size)
            raise

    def _load(self, tensors: dict[str, Tensor], counters: dict[str, int]) -> None:
        self.position = given.saved_position(counters)
        memory = {name[7:]: tensor for name, tensor in tensors.items() if name.startswith("memory.")}
        own = {name: tensor for name, tensor in tensors.items() if not name.startswith("memory.")}
        self.memory.load_state_dict(memory, counters)  # takes out of it what it loads, as the two below do
        kept = min(self.start_frame, self.config.sink_frames + self.config.window_frames)
        self.history = given.saved_latents(own, (self.size[0], self.model.channels, kept, *self.size[1:]), self.model)
        self.in_force, self.coming = (given.saved_text(own, n, self.size[0], self.model) for n in ("text", "next"))
        self._version = self.model.text_version()
        if memory or own:
            raise ValueError(f"unknown tensors: {', '.join([*memory, *own])}")
        if self.position and self.in_force is None:
            raise ValueError("text.embeds is missing: the prompt of the last chunk")
        self._begun = self._ready = self.position - 1  # no chunk is in hand,
        self._step = self._unwritten = None  # and no clean pass is due

    def _require_memory(self, name: str) -> None:
        if self.memory is None:
            raise MemFlowError(f"{name}: there is no memory yet; call open(batch, rows, columns) first")

    def follow_model(self) -> None:
        """Encode the prompts again where the model has changed since: their keys and values are those of its weights.

        A chunk does so when it begins, not between its steps; nothing has happened yet where it raises.

        Raises:
            MemFlowError: a model that the memory does not fit any more.
        """
        model = self.model
        with own_modes():
            version = model.text_version()
            if self.memory is not None:
                given.check_unchanged(self.memory.pool.key, model, dtype=version != self._version)
            if version == self._version:
                return
            self.in_force, self.coming = (
                t and given.EncodedText.of(model, *t[:2]) for t in (self.in_force, self.coming)
            )
            if self._unwritten is not None:
                latents, step = self._unwritten
                self._unwritten = latents, step._replace(prompt=self.in_force.prompt)
        self._version = version

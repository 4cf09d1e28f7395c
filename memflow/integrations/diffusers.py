"""A memory for diffusers' WanTransformer3DModel in a generation loop that is not ours."""

from __future__ import annotations

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from memflow.errors import MemFlowError
from memflow.memory.config import MemoryConfig
from memflow.memory.frames import FrameMemory, MemorySnapshot, Prompt
from memflow.models.wan.attention import head_sizes, install, uninstall
from memflow.models.wan.passes import denoise, encode_prompt, fix


class StreamingAttention:
    """Gives a transformer the attention processors of a stream, and calls it chunk by chunk.

    transformer: a WanTransformer3DModel, used in place; its weights, adapters and blocks stay what they are.
    memory: what is remembered and activated; `MemoryConfig()` by default. Its frames_per_chunk is a chunk's length.

    `prompt`, then for every chunk `denoise` as often as the sampler likes and `keep` once. `remove` gives the
    transformer its own attention back. Several of these on one transformer can take turns.
    """

    def __init__(self, transformer: WanTransformer3DModel, memory: MemoryConfig | None = None):
        self.transformer = transformer
        self.config = MemoryConfig() if memory is None else memory
        if not isinstance(self.config, MemoryConfig):
            raise MemFlowError(f"memory must be a MemoryConfig, got {type(memory).__name__}")
        install(transformer)
        self.position, self.begun = 0, -1
        self.memory: FrameMemory | None = None
        self.text: Prompt | None = None
        self.history: Tensor | None = None
        self.switched = False

    @property
    def start_frame(self) -> int:
        """Number of the latent frame that the chunk in hand begins with."""
        return self.position * self.config.frames_per_chunk

    @property
    def device(self) -> torch.device:
        """Where the transformer computes: under `enable_model_cpu_offload` its weights lie elsewhere between calls."""
        hook = getattr(self.transformer, "_hf_hook", None)
        device = getattr(hook, "execution_device", None)
        return self.transformer.device if device is None else torch.device(device)

    @torch.no_grad()
    def prompt(self, embeds: Tensor, mask: Tensor | None = None) -> None:
        """Attend to a prompt from the next chunk on.

        embeds: [B, T, text_dim] from the text encoder, rows of padding zero. mask: [B, T], True where a token counts
        for retrieval; by default where a row of embeds is not zero.
        """
        dim = self.transformer.config.text_dim
        if embeds.ndim != 3 or embeds.shape[2] != dim:
            raise MemFlowError(f"embeds must be [B, T, {dim}], got {list(embeds.shape)}")
        mask = (embeds != 0).any(-1) if mask is None else mask.bool()
        if mask.shape != embeds.shape[:2]:
            raise MemFlowError(f"mask must be [B, T] = {list(embeds.shape[:2])}, got {list(mask.shape)}")
        if self.begun == self.position:
            raise MemFlowError(f"prompt: chunk {self.position} is under way under another one; keep it first")
        device = self.device
        self.text = encode_prompt(self.transformer, embeds.to(device, self.transformer.dtype), mask.to(device))
        self.switched = self.position > 0

    @torch.no_grad()
    def denoise(self, latents: Tensor, timestep: float) -> Tensor:
        """What the transformer predicts for the noisy chunk `latents` [B, C, frames_per_chunk, h, w] at `timestep`, 0
        to 1000: the flow, of the same shape, dtype and device."""
        step = self._begin(latents).pass_over(self.start_frame, latents.shape[2], self.text)
        return denoise(self.transformer, self._input(latents), timestep, step).to(latents)

    @torch.no_grad()
    def keep(self, latents: Tensor) -> None:
        """The clean chunk `latents` [B, C, frames_per_chunk, h, w] is the result: remember it and go on to the next."""
        memory, config = self._begin(latents), self.config
        fix(self.transformer, self._input(latents), memory.pass_over(self.start_frame, latents.shape[2], self.text))
        memory.end_chunk(self.start_frame)
        kept = config.sink_frames + config.window_frames
        latents = latents.detach().clone()  # the caller's, who may go on to write into them
        self.history = latents if self.history is None else torch.cat([self.history, latents], dim=2)[:, :, -kept:]
        self.position += 1

    def snapshot(self) -> MemorySnapshot:
        """What the memory holds. Waits for the device."""
        if self.memory is None or self.position == 0:
            raise MemFlowError("snapshot: no chunk has been kept yet")
        return self.memory.snapshot(self.start_frame, self.text)

    def remove(self) -> None:
        """Give the transformer its own attention back."""
        uninstall(self.transformer)

    def _memory_for(self, latents: Tensor) -> FrameMemory:
        if self.text is None:
            raise MemFlowError("which prompt? Call prompt(embeds) before the first chunk")
        model, frames = self.transformer.config, self.config.frames_per_chunk
        _, rows, columns = model.patch_size
        shape = list(latents.shape)
        fits = latents.ndim == 5 and shape[1:3] == [model.in_channels, frames]
        if not fits or shape[3] % rows or shape[4] % columns or shape[0] != self.text.mask.shape[0]:
            raise MemFlowError(
                f"latents must be [{self.text.mask.shape[0]}, {model.in_channels}, {frames}, h, w], h and w multiples "
                f"of {rows} and {columns}, got {shape}"
            )
        grid = (shape[3] // rows, shape[4] // columns)
        if self.memory is None:
            self.memory = self.config.create(
                **head_sizes(self.transformer),
                batch=shape[0],
                grid=grid,
                dtype=self.transformer.dtype,
                device=self.device,
            )
        if self.memory.grid != grid:
            raise MemFlowError(f"latents: a stream keeps its size; it began with {self.memory.grid} tokens, not {grid}")
        return self.memory

    def _begin(self, latents: Tensor) -> FrameMemory:
        """The memory, made ready for the chunk in hand when that is seen for the first time."""
        memory = self._memory_for(latents)
        if self.begun < self.position:
            self.begun = self.position
            if self.switched:
                self._encode_again(memory)
            memory.update(self.start_frame, self.text)
        return memory

    def _encode_again(self, memory: FrameMemory) -> None:
        """The frames that stay in the window, under the new prompt."""
        self.switched = False
        memory.switch_prompt(self.start_frame, self.text)
        first, count = memory.recache_span(self.start_frame)
        if count:
            step = memory.pass_over(first, count, self.text)
            fix(self.transformer, self._input(self.history[:, :, -count:]), step)

    def _input(self, latents: Tensor) -> Tensor:
        return latents.to(self.device, self.transformer.dtype)

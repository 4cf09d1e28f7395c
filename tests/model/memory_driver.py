"""Drives a `FrameMemory` without a model: every frame's keys carry its number and the pass that wrote it."""

from __future__ import annotations

import torch

from memflow.memory.config import MemoryConfig
from memflow.memory.frames import Prompt

TOKENS, HEADS, DIM = 2, 2, 4


class MemoryDriver:
    """A one-layer stream. `frame_keys` maps a frame number to the key vector that its tokens get, [DIM]."""

    def __init__(self, config: MemoryConfig, batch: int = 1, layers: int = 1, frame_keys=None):
        self.config = config
        self.batch = batch
        self.memory = config.create(
            layers=layers,
            batch=batch,
            heads=HEADS,
            head_dim=DIM,
            grid=(1, TOKENS),
            dtype=torch.float32,
            device="cpu",
        )
        self.layers = layers
        self.frame_keys = frame_keys or (lambda frame: torch.full((DIM,), float(frame)))
        self.position = 0
        self.prompt = prompt_of(torch.ones(DIM), layers, batch)
        self.seen: list[list[int]] = []

    def chunk(self, new_prompt: Prompt | None = None) -> list[int]:
        """Make one chunk as `Stream` does; returns the frames that its passes attended to. `seen` has every pass."""
        memory, start = self.memory, self.position * self.config.frames_per_chunk
        if new_prompt is not None:
            self.prompt = new_prompt
            memory.switch_prompt(start, self.prompt)
            first, count = memory.recache_span(start)
            if count:
                self.seen.append(self.contents(self._write(first, count)))
        memory.update(start, self.prompt)
        step = self._write(start, self.config.frames_per_chunk)
        self.seen.append(self.contents(step))
        memory.end_chunk(start)
        self.position += 1
        return self.seen[-1]

    def contents(self, step) -> list[int]:
        """Numbers of the frames in the slots that a pass attends to, as their values say (row 0, layer 0)."""
        values = self.memory.pool.value[0, 0].unflatten(0, (-1, TOKENS))[step.first_slot : step.end_slot, 0, 0, 0]
        return [int(v) for v in values]

    def bank(self, layer: int = 0, row: int = 0) -> list[int]:
        return self.memory.held[layer, row].tolist()

    def _write(self, start: int, frames: int):
        step = self.memory.pass_over(start, frames, self.prompt)
        for offset, slot in enumerate(step.slots.tolist()):
            if slot >= 0:
                span = slice(slot * TOKENS, (slot + 1) * TOKENS)
                key = self.frame_keys(start + offset)
                self.memory.pool.key[:, :, span] = key
                self.memory.pool.value[:, :, span] = float(start + offset)
                self.memory.pool.frame_mean[:, :, slot] = key
        return step


def prompt_of(key: torch.Tensor, layers: int = 1, batch: int = 1) -> Prompt:
    """A prompt of one token that every head sees as `key` [DIM]."""
    keys = key.expand(layers, batch, 1, HEADS, DIM).clone()
    return Prompt(keys, keys, torch.ones(batch, 1, dtype=torch.bool))

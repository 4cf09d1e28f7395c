"""A model without weights for `ChunkDriver`: every frame's keys carry its number and the pass that wrote it."""

from __future__ import annotations

import torch

from memflow.memory import MemoryConfig, Prompt
from memflow.memory.places import Rotation
from memflow.stream.chunks import ChunkDriver

TOKENS, HEADS, DIM = 2, 2, 4


class NumberedModel:
    """A `VideoModel` whose latents are frame numbers. `frame_keys` maps a number to its tokens' key vector, [DIM]."""

    heads, head_dim, channels, text_dim = HEADS, DIM, 1, 1
    dtype, device, rotation = torch.float32, torch.device("cpu"), Rotation()

    def __init__(self, layers: int, frame_keys):
        self.layers, self.frame_keys = layers, frame_keys
        self.prompt: Prompt | None = None
        self.seen: list[list[int]] = []

    def number(self, frame: int) -> int:
        """What a pass writes for a frame."""
        return frame

    def grid(self, rows, columns):
        return rows, columns

    def encode_prompt(self, embeds, mask):
        return self.prompt

    def text_version(self):
        return None

    def denoise(self, latents, timestep, step):
        return latents

    def write_clean(self, latents, step):
        pool, used = step.pools, [slot for slot in step.slots.tolist() if slot >= 0]
        assert len(set(used)) == len(used), "two frames of a pass in one slot: on a GPU either may win"
        for frame, slot in zip(latents[0, 0, :, 0, 0].int().tolist(), step.slots.tolist(), strict=True):
            for layer in range(self.layers) if slot >= 0 else ():
                number = self.number(frame)
                key = self.frame_keys(number)
                pool[layer].key[:, slot * TOKENS : (slot + 1) * TOKENS] = key
                pool[layer].value[:, slot * TOKENS : (slot + 1) * TOKENS] = float(number)
                pool[layer].frame_mean[:, slot] = key
        self.seen.append(contents(step))


class MemoryDriver:
    """A stream of numbers."""

    def __init__(self, config: MemoryConfig, batch: int = 1, layers: int = 1, frame_keys=None):
        self.config, self.batch = config, batch
        self.model = NumberedModel(layers, frame_keys or (lambda frame: torch.full((DIM,), float(frame))))
        self.driver = ChunkDriver(self.model, config)
        self.driver.open(batch, 1, TOKENS)
        self.memory = self.driver.memory
        self.prompt = prompt_of(torch.ones(DIM), layers, batch)

    @property
    def prompt(self) -> Prompt:
        """The prompt in force."""
        return self.model.prompt

    @prompt.setter
    def prompt(self, prompt: Prompt) -> None:
        """That of the first chunk."""
        self.model.prompt = self._first = prompt

    @property
    def position(self) -> int:
        return self.driver.position

    @property
    def seen(self) -> list[list[int]]:
        """The frames that each pass attended to: those that encode the window again, and one per chunk."""
        return self.model.seen

    def chunk(self, new_prompt: Prompt | None = None) -> list[int]:
        """Make one chunk; returns the frames that its passes attended to."""
        new_prompt, self._first = new_prompt or self._first, None
        if new_prompt is not None:
            self.model.prompt = new_prompt
            self.driver.prompt(torch.ones(self.batch, 1, 1))
        numbers = self.driver.start_frame + torch.arange(float(self.config.frames_per_chunk))
        self.driver.keep(numbers.view(1, 1, -1, 1, 1).expand(self.batch, 1, -1, 1, TOKENS))
        self.driver.settle()
        return self.seen[-1]

    def bank(self, layer: int = 0, row: int = 0) -> list[int]:
        return self.memory.held[layer, row].tolist()


def contents(step) -> list[int]:
    """Numbers of the frames in the slots that a pass attends to, as their values say (row 0, layer 0)."""
    values = step.pools[0].value[0].unflatten(0, (-1, TOKENS))[step.first_slot : step.end_slot, 0, 0, 0]
    return [int(v) for v in values]


def prompt_of(key: torch.Tensor, layers: int = 1, batch: int = 1) -> Prompt:
    """A prompt of one token that every head sees as `key` [DIM]."""
    keys = key.expand(layers, batch, 1, HEADS, DIM).clone()
    return Prompt(keys, keys, torch.ones(batch, 1, dtype=torch.bool))

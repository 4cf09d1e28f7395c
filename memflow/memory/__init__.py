"""What a stream remembers: sink, window and bank of past frames, and what is held beyond the bank.

`make_memory(config, ...)` gives the memory that a `MemoryConfig` asks for.
"""

from __future__ import annotations

from memflow.memory.config import MemoryConfig
from memflow.memory.frames import FrameMemory, MemorySnapshot, Pass, Prompt
from memflow.memory.held import HeldMemory
from memflow.memory.published import PublishedMemory

__all__ = ["FrameMemory", "MemoryConfig", "MemorySnapshot", "Pass", "Prompt", "make_memory"]


def make_memory(config: MemoryConfig, **sizes) -> FrameMemory:
    """The memory of one stream.

    Args:
        config: what is held, shown and activated.
        sizes: layers, batch, heads, head_dim, grid, dtype, device and seeds, as `FrameMemory` takes them.

    Example:
        >>> import torch
        >>> sizes = {"layers": 2, "batch": 1, "heads": 2, "head_dim": 24, "grid": (2, 3)}
        >>> memory = make_memory(MemoryConfig(bank_frames=6), **sizes, dtype=torch.float32, device="cpu")
        >>> memory.pool.key.shape  # layers, batch, tokens of all slots, heads, head_dim
        torch.Size([2, 1, 108, 2, 24])
    """
    if config.published_mode is not None:
        return PublishedMemory(config, **sizes)
    if config.held_frames is not None or config.keeps_all:
        return HeldMemory(config, **sizes)
    return FrameMemory(config, **sizes)

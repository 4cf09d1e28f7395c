"""What a stream remembers: sink, window and bank of past frames, and what is held beyond the bank.

`make_memory(config, ...)` gives the memory that a `MemoryConfig` asks for.
"""

from memflow.memory.config import MemoryConfig
from memflow.memory.frames import FrameMemory, MemorySnapshot, Pass, Prompt, make_memory
from memflow.memory.held import HeldMemory
from memflow.memory.published import PublishedMemory

__all__ = [
    "FrameMemory",
    "HeldMemory",
    "MemoryConfig",
    "MemorySnapshot",
    "Pass",
    "Prompt",
    "PublishedMemory",
    "make_memory",
]

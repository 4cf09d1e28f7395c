"""What a stream remembers: sink, window and bank of past frames, and what is held beyond the bank.

`make_memory(config, ...)` gives the memory that a `MemoryConfig` asks for. The names below are imported when they are
first used: what computes imports torch, and the command line's help lists the policies without.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memflow.memory.attention import Pass
    from memflow.memory.config import MemoryConfig
    from memflow.memory.frames import FrameMemory, make_memory
    from memflow.memory.held import HeldMemory
    from memflow.memory.published import PublishedMemory
    from memflow.memory.views import MemorySnapshot, Prompt

_HOME = {
    "FrameMemory": "frames",
    "HeldMemory": "held",
    "MemoryConfig": "config",
    "MemorySnapshot": "views",
    "Pass": "attention",
    "Prompt": "views",
    "PublishedMemory": "published",
    "make_memory": "frames",
}
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

if not TYPE_CHECKING:

    def __getattr__(name: str):
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)

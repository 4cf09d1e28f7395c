"""Streaming stories with a narrative memory, on diffusers and transformers.

The names below are imported when they are first used, so that `import memflow` stays cheap.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memflow.errors import MemFlowError
    from memflow.memory.config import MemoryConfig
    from memflow.memory.views import MemorySnapshot
    from memflow.stream.chunks import ChunkDriver
    from memflow.stream.pipeline import MemFlowPipeline
    from memflow.stream.stream import Chunk, Stream

__version__ = "0.2.0"

__all__ = [
    "Chunk",
    "ChunkDriver",
    "MemFlowError",
    "MemFlowPipeline",
    "MemoryConfig",
    "MemorySnapshot",
    "Stream",
    "__version__",
]
_HOME = {
    "Chunk": "memflow.stream.stream",
    "ChunkDriver": "memflow.stream.chunks",
    "MemFlowError": "memflow.errors",
    "MemFlowPipeline": "memflow.stream.pipeline",
    "MemoryConfig": "memflow.memory.config",
    "MemorySnapshot": "memflow.memory.views",
    "Stream": "memflow.stream.stream",
}

if not TYPE_CHECKING:  # to a type checker it would make a name that does not exist one of type Any

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            return getattr(import_module(_HOME[name]), name)
        except ModuleNotFoundError as error:
            from memflow.errors import missing_package

            message = missing_package(error)
            if message is None:
                raise
            raise ModuleNotFoundError(f"memflow.{name}: {message}", name=error.name) from error


def __dir__() -> list[str]:
    return sorted(__all__)

"""Streaming stories with a narrative memory, on diffusers and transformers.

The names below are imported when they are first used, so that `import memflow` stays cheap.
"""

from importlib import import_module

__version__ = "0.2.0"

_HOME = {
    "Chunk": "memflow.stream.stream",
    "ChunkDriver": "memflow.stream.chunks",
    "MemFlowError": "memflow.errors",
    "MemFlowPipeline": "memflow.stream.pipeline",
    "MemoryConfig": "memflow.memory.config",
    "MemorySnapshot": "memflow.memory.frames",
    "Stream": "memflow.stream.stream",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str):
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

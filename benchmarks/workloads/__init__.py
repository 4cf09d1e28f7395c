"""What is timed: one module per workload, each with its state, its float64 check and its counts."""

from .base import Verdict, Workload
from .operations import Attention, Means, Update, Write
from .whole_layer import Chunk, Layer

WORKLOADS: dict[str, type[Workload]] = {cls.name: cls for cls in (Attention, Means, Write, Update, Layer, Chunk)}

__all__ = ["WORKLOADS", "Attention", "Chunk", "Layer", "Means", "Update", "Verdict", "Workload", "Write"]

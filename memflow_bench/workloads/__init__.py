"""What is timed: one module per workload, each with its state, its float64 check and its counts."""

from .base import Verdict, Workload
from .operations import Attention, Means, Update, Write
from .training import Backward, BlockCausal, BlockCausalStep, Training
from .whole_layer import Chunk, Layer

KINDS = (Attention, Means, Write, Update, Layer, Chunk, Training, Backward, BlockCausal, BlockCausalStep)
WORKLOADS: dict[str, type[Workload]] = {kind.name: kind for kind in KINDS}

__all__ = ["WORKLOADS", "Verdict", "Workload", *(kind.__name__ for kind in KINDS)]

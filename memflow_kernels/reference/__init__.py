"""The ops in plain torch: the specification of every other backend, and the backend `torch`.

One function per operator, named like it. Inputs were checked by memflow_kernels.ops; only the values of index tensors
are checked here, and only on the CPU, where reading them waits for nothing.
"""

from ..operators import implementations
from .rotary import rms_norm, rotate_3d

globals().update(implementations(__name__))  # last: modules of these names give way to their ops

__all__ = ["rms_norm", "rotate_3d"]

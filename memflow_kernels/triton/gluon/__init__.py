"""Kernels in Gluon, Triton's lower layer: warps have roles of their own. triton/configs.py says where they run."""

import triton

# Releases before 3.6 have another Gluon. They are served by the other Triton kernels.
AVAILABLE = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 6)

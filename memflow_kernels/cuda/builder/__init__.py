"""Builds csrc/ into one library with nvcc and ninja: the standard library alone, so that setup.py can use it as it is.

`setup.py` builds ahead of time, `memflow_kernels.cuda.extension` at first use; both through `compile_library`.
"""

from .architectures import ARCHITECTURES_VARIABLE, Architecture, architectures
from .cache import cached_library
from .compiler import compile_library
from .errors import BuildError
from .recipe import Recipe, source_folder
from .toolchain import Toolchain, find_toolchain

__all__ = [
    "ARCHITECTURES_VARIABLE",
    "Architecture",
    "BuildError",
    "Recipe",
    "Toolchain",
    "architectures",
    "cached_library",
    "compile_library",
    "find_toolchain",
    "source_folder",
]

"""The compiled library: built ahead of time into the package, or at first use into a cache."""

from __future__ import annotations

import functools
import sys
import warnings
from pathlib import Path

import torch

from .builder import BuildError, Recipe, cache_folder, cached_library, find_toolchain, library_of
from .builder.private import is_whole
from .builder.toolchain import ARCHITECTURES_VARIABLE, parse

AHEAD_OF_TIME = Path(__file__).with_name("memflow_cuda.abi3.so")  # where setup.py puts it


@functools.cache
def _recipe() -> Recipe | str:
    """How the library is built here, or why it cannot be. Asked once per process: it runs the compiler."""
    if not sys.platform.startswith("linux"):
        return "the compiled kernels are for Linux"
    try:
        return Recipe.here(find_toolchain())
    except BuildError as error:
        return str(error)


def missing() -> str | None:
    """Why there is no compiled library and none can be built here; None where there is one or can be."""
    found = None if AHEAD_OF_TIME.is_file() else _recipe()
    return f"no compiled kernels are installed, and none can be built: {found}" if isinstance(found, str) else None


def described() -> str:
    """Where the library is or how it would come to be, for `memflow doctor`. Builds and loads nothing."""
    if AHEAD_OF_TIME.is_file():
        return f"built ahead of time, {AHEAD_OF_TIME}"
    recipe = _recipe()
    if isinstance(recipe, str):
        return f"not built and cannot be: {recipe}"
    if is_whole(library_of(recipe)):
        return f"built at an earlier use, {library_of(recipe)}"
    where = f"into {cache_folder()}, for {recipe.target_names} ({ARCHITECTURES_VARIABLE} changes that)"
    return f"not built yet; the first use on a GPU does it with {recipe.toolchain}, {where}"


def _library() -> Path:
    """The library, built now where it is not there yet. Raises BuildError."""
    if AHEAD_OF_TIME.is_file():
        return AHEAD_OF_TIME
    recipe = _recipe()
    if isinstance(recipe, str):
        raise BuildError(recipe)
    return cached_library(recipe)


@functools.cache
def unloadable() -> str | None:
    """Builds the library where needed and loads it: None, and its ops are there, or why it cannot be used.

    A reason is also shown as a RuntimeWarning, once: who asked for these kernels gets others.
    """
    try:
        library = _library()
        torch.ops.load_library(library)
        reason = torch.ops.memflow_cuda.runtime_error()
    except (BuildError, OSError) as error:
        reason = str(error)
    if not reason:
        return None
    warnings.warn(f"the CUDA kernels cannot be used, others run in their place: {reason}", RuntimeWarning, stacklevel=2)
    return reason


@functools.cache
def not_compiled_for(index: int) -> str | None:
    """Why the loaded library does not run on GPU number `index`, also shown as a warning, once; None where it does."""
    names = torch.ops.memflow_cuda.architectures()
    capability = torch.cuda.get_device_capability(index)
    if any(architecture.serves(capability) for architecture in parse(names)):
        return None
    number = ".".join(map(str, capability))
    reason = f"compiled for {names}, not for this GPU: build them with {ARCHITECTURES_VARIABLE}={number}"
    warnings.warn(f"the CUDA kernels cannot be used, others run in their place: {reason}", RuntimeWarning, stacklevel=2)
    return reason

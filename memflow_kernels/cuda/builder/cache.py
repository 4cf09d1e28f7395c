"""The folder of built libraries: one build at a time, and a library is there as a whole or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .compiler import compile_library, first_error
from .errors import BuildError
from .recipe import Recipe

CACHE_VARIABLE = "MEMFLOW_CUDA_CACHE"
LIBRARY = "memflow_cuda.so"


def cache_folder() -> Path:
    """MEMFLOW_CUDA_CACHE, or memflow/cuda in the user's cache folder (XDG_CACHE_HOME, else ~/.cache).

    Raises BuildError where none of them is known.
    """
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "memflow", "cuda")
    except RuntimeError as error:
        raise BuildError(f"there is no place for a cache ({error}); {CACHE_VARIABLE} can name one") from None


def library_of(recipe: Recipe) -> Path:
    """Where the library of `recipe` lies, or will."""
    return cache_folder() / recipe.key / LIBRARY


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; the system gives the lock free when its holder ends, however that happens."""
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("memflow: another process is building the CUDA kernels; waiting for it", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # closing would not do: a process forked meanwhile has it open too


def cached_library(recipe: Recipe) -> Path:
    """The library of `recipe`, built now where the cache does not have it.

    Raises BuildError with the compiler's first error; its whole output is then in build.log beside the library's place.
    """
    library = library_of(recipe)
    if library.is_file():
        return library
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        log, asked = library.parent / "build.log", time.time()
        with _locked(library.parent / "lock"):
            if not library.is_file():  # else whoever held the lock has built it
                if log.is_file() and log.stat().st_mtime > asked:  # and it failed: so would this
                    error = first_error(log.read_text(errors="replace").splitlines())
                    raise BuildError(f"{error} (all of it: {log})")
                _build(recipe, library)
    except OSError as error:
        raise BuildError(f"the cache folder {library.parent} cannot be used: {error}") from error
    return library


def _build(recipe: Recipe, library: Path) -> None:
    for left in library.parent.glob("building-*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix="building-", dir=library.parent))
    try:
        os.replace(compile_library(recipe, folder, LIBRARY), library)
    except BuildError as error:
        log = library.parent / "build.log"
        os.replace(folder / "build.log", log)
        raise BuildError(f"{error} (all of it: {log})") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)

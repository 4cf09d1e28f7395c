"""Builds csrc/ into one library with nvcc and ninja: the standard library alone, so that setup.py can use it as it is.

`setup.py` builds ahead of time, through `compile_library`; `memflow_kernels.cuda.extension` at first use, through
`cached_library`, into a folder in which a library is there as a whole or not at all.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, TextIO

from .private import is_whole, make_private, move_sealed, open_lock, seal
from .toolchain import Architecture, BuildError, Toolchain, architectures, find_toolchain

__all__ = ["BuildError", "Recipe", "Toolchain", "cached_library", "compile_library", "find_toolchain", "source_folder"]

# nvcc reads these itself: they change what it does as flags do.
NVCC_VARIABLES = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "NVCC_CCBIN")
COMPILE_FLAGS = ("-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden")
LINK_FLAGS = ("-shared", "-cudart=static", "-Xlinker=--no-undefined")
LIBRARIES = ("-ltorch_cpu",)  # of torch, only the library that every build of it has
RULES = {".cu": "device", ".cpp": "host"}
HEADERS = (".cuh", ".h")
CACHE_VARIABLE = "MEMFLOW_CUDA_CACHE"
LIBRARY = "memflow_cuda.so"
_STEP = re.compile(r"\[\d+/\d+\]")
# "file.cu(12): error: ...", "file.cpp:3:10: fatal error: ...", "nvcc fatal   : ...", "ptxas error   : ..."
_ERROR = re.compile(r"\b(error|fatal)\b\s*(#\S*\s*)?:|: undefined reference|cannot find -l", re.IGNORECASE)


def source_folder() -> Path:
    """csrc/: inside the installed package, or beside it in a checkout. Raises BuildError where there is none."""
    package = Path(__file__).resolve().parents[2]
    for folder in (package / "csrc", package.parent / "csrc"):
        if (folder / "bindings.cpp").is_file():
            return folder
    raise BuildError(f"the sources of the CUDA kernels are missing: there is no csrc folder in or beside {package}")


def torch_folder() -> Path:
    """The installed torch, found without importing it. Raises BuildError where there is none."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError("torch is not installed: its headers are needed to compile csrc/bindings.cpp")
    return Path(spec.origin).parent


class Recipe(NamedTuple):
    """One way to build the library."""

    sources: Path  # the folder
    toolchain: Toolchain
    targets: tuple[Architecture, ...]
    torch: Path  # of which the headers and libtorch_cpu.so are used

    @classmethod
    def here(cls, toolchain: Toolchain) -> Recipe:
        """With the sources, the torch and the environment variables of this process. Raises BuildError."""
        targets = architectures(toolchain.known, str(toolchain))
        return cls(source_folder(), toolchain, targets, torch_folder())

    @property
    def files(self) -> list[Path]:
        """Every source file, headers too, in the order of their names."""
        return sorted(path for path in self.sources.iterdir() if path.suffix in (*RULES, *HEADERS))

    @property
    def target_names(self) -> str:
        """ "8.0;9.0a"."""
        return ";".join(map(str, self.targets))

    @property
    def key(self) -> str:
        """Changes with the sources, the compiler's version, the flags, the architectures and the kind of machine.

        torch has no part in it: its stable ABI is the same in every version.
        """
        parts = [
            *(f"{path.name}\n{hashlib.sha256(path.read_bytes()).hexdigest()}" for path in self.files),
            self.toolchain.version,
            self.target_names,
            *COMPILE_FLAGS, *LINK_FLAGS, *LIBRARIES,
            *(f"{name}={os.environ.get(name, '')}" for name in NVCC_VARIABLES),
            platform.machine(), *platform.libc_ver(),
        ]  # fmt: skip
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]

    def ninja_file(self, library: Path) -> str:
        """build.ninja, for the folder of `library`: one object per source file, and the library of them all."""
        nvcc, own = self.toolchain.nvcc, f"-I{self.sources}"
        torch_headers = ["-isystem", str(self.torch / "include"), f'-DMEMFLOW_ARCHITECTURES="{self.target_names}"']
        targets = [*(flag for target in self.targets for flag in target.flags), "--threads", str(len(self.targets))]
        folders = [f"-L{self.torch / 'lib'}", f"-L{self.toolchain.libraries}"]
        commands = {
            "host": _command([nvcc, *COMPILE_FLAGS, own, *torch_headers], "-c $in -o $out"),
            "device": _command([nvcc, *COMPILE_FLAGS, own, *targets], "-c $in -o $out"),
            "library": _command([nvcc, *LINK_FLAGS], "-o $out $in", [*folders, *LIBRARIES]),
        }
        lines = [f"rule {name}\n  command = {command}" for name, command in commands.items()]
        objects = []
        for path in self.files:
            if path.suffix in RULES:
                objects.append(f"{path.stem}.o")
                lines.append(f"build {objects[-1]}: {RULES[path.suffix]} {_path(path)}")
        lines.append(f"build {_path(library.name)}: library {' '.join(objects)}")
        return "\n".join(lines) + "\n"


def _command(words: list[str], files: str, last: list[str] | None = None) -> str:
    """A command for the shell with the files that ninja puts in."""
    before, after = (shlex.join(part).replace("$", "$$") for part in (words, last or []))
    return f"{before} {files} {after}".rstrip()


def _path(path: Path | str) -> str:
    """A file name in a build statement."""
    return "".join(f"${letter}" if letter in "$ :" else letter for letter in str(path))


def first_error(output: list[str]) -> str:
    """The line in which a compiler, linker or ninja first says what is wrong; the last line where none does."""
    lines = [line.strip() for line in output if line.strip()]
    return next((line for line in lines if _ERROR.search(line)), lines[-1] if lines else "it said nothing")


def compile_library(recipe: Recipe, folder: Path, name: str) -> Path:
    """Build the library `name` in `folder`, an empty one; a progress line goes to stderr. Returns its path.

    What the compiler says is kept in build.log there. Raises BuildError with its first error.
    """
    library = folder / name
    (folder / "build.ninja").write_text(recipe.ninja_file(library))
    with (
        Progress(f"with nvcc {recipe.toolchain.version} for {recipe.target_names}") as progress,
        open(folder / "build.log", "w") as log,
    ):
        status, output = _run(recipe.toolchain.ninja, folder, progress, log)
    if status or not library.is_file():
        raise BuildError(first_error(output))
    return library


class Progress:
    """One line on stderr: in a terminal it changes with every finished step, in a log it stays as it began."""

    def __init__(self, how: str):
        self.how, self.changes = how, sys.stderr.isatty()

    def __enter__(self) -> Progress:
        self._print("")
        return self

    def show(self, line: str) -> None:
        """`line`: what ninja said; only the beginning of a step, [2/9], counts."""
        step = _STEP.match(line)
        if step and self.changes:
            self._print(f" {step[0]}")

    def __exit__(self, *error: object) -> None:
        if self.changes:
            print(file=sys.stderr, flush=True)

    def _print(self, step: str) -> None:
        text = f"memflow: building the CUDA kernels{step} {self.how}"
        if self.changes:  # a line that fills the width would begin another
            text = f"\r{text[: shutil.get_terminal_size().columns - 1]}"
        print(text, end="" if self.changes else "\n", file=sys.stderr, flush=True)


def _run(ninja: str, folder: Path, progress: Progress, log: TextIO) -> tuple[int, list[str]]:
    """Exit code and lines of the output, which go into the log as they come."""
    jobs = os.environ.get("MAX_JOBS", "")
    try:
        process = subprocess.Popen(
            [ninja, *(["-j", jobs] if jobs.isdigit() else [])],
            cwd=folder,
            env={**os.environ, "NINJA_STATUS": "[%f/%t] "},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise BuildError(f"{ninja} does not run: {error}") from error
    output = []
    with process:
        try:
            for line in process.stdout:
                log.write(line)
                output.append(line)
                progress.show(line)
        except BaseException:  # Ctrl-C: the compilers stop too
            process.terminate()
            raise
    return process.returncode, output


def cache_folder() -> Path:
    """MEMFLOW_CUDA_CACHE, or memflow/cuda in the user's cache folder (XDG_CACHE_HOME where it is absolute, else
    ~/.cache).

    Raises BuildError where none of them is known.
    """
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen)
    home = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return (home if home.is_absolute() else Path.home() / ".cache") / "memflow" / "cuda"
    except RuntimeError as error:
        raise BuildError(f"there is no place for a cache ({error}); {CACHE_VARIABLE} can name one") from None


def library_of(recipe: Recipe) -> Path:
    """Where the library of `recipe` lies, or will."""
    return cache_folder() / recipe.key / LIBRARY


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; the system gives the lock free when its holder ends, however that happens."""
    import fcntl  # Unix alone has its locks

    with open(open_lock(path), "r+b") as file:
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
    """The library of `recipe`, built now where the cache does not have it, or not as it was built.

    Raises BuildError with the compiler's first error; its whole output is then in build.log beside the library's place.
    """
    library = library_of(recipe)
    if is_whole(library):
        return library
    try:
        make_private(library.parent.parent)
        make_private(library.parent)
        log, asked = library.parent / "build.log", time.time()
        with _locked(library.parent / "lock"):
            if not is_whole(library):  # else whoever held the lock has built it
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
        built = compile_library(recipe, folder, LIBRARY)
        seal(built)
        move_sealed(built, library)
    except BuildError as error:
        log = library.parent / "build.log"
        os.replace(folder / "build.log", log)
        raise BuildError(f"{error} (all of it: {log})") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)

"""What is compiled and how: everything that decides about the result, and the key made of it."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from .architectures import Architecture, architectures
from .errors import BuildError
from .toolchain import Toolchain

# nvcc reads these itself: they change what it does as flags do.
NVCC_VARIABLES = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "NVCC_CCBIN")
COMPILE_FLAGS = ("-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden")
LINK_FLAGS = ("-shared", "-cudart=static", "-Xlinker=--no-undefined")
LIBRARIES = ("-ltorch_cpu",)  # of torch, only the library that every build of it has
RULES = {".cu": "device", ".cpp": "host"}
HEADERS = (".cuh", ".h")


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

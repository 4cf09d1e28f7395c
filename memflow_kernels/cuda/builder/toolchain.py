"""Finds nvcc and ninja."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from .errors import BuildError

USUAL_HOME = Path("/usr/local/cuda")


class Toolchain(NamedTuple):
    """nvcc, ninja: their paths. version: of nvcc, "13.0.88". known: the architectures that it knows, {"80", ...}."""

    nvcc: str
    ninja: str
    version: str
    known: frozenset[str]

    def __str__(self) -> str:
        return f"nvcc {self.version} ({self.nvcc})"

    @property
    def libraries(self) -> Path:
        """Where the pip package has the CUDA runtime: its nvcc does not look there by itself."""
        return Path(self.nvcc).parents[1] / "lib"


def _packaged_nvcc() -> list[Path]:
    """That of the pip package nvidia-cuda-nvcc, of CUDA 13 or newer: the older package holds no nvcc."""
    spec = importlib.util.find_spec("nvidia")
    folders = (spec.submodule_search_locations or ()) if spec else ()
    return [path for folder in folders for path in sorted(Path(folder).glob("cu*/bin/nvcc"))]


def find_nvcc() -> str:
    """CUDA_HOME, the PATH, the pip package nvidia-cuda-nvcc, /usr/local/cuda: the first that has it.

    Raises BuildError that says where it was looked for.
    """
    home = os.environ.get("CUDA_HOME")
    places = [] if not home else [Path(home, "bin", "nvcc")]
    on_path = shutil.which("nvcc")
    if on_path:
        places.append(Path(on_path))
    places += _packaged_nvcc()
    places.append(USUAL_HOME / "bin" / "nvcc")
    for place in places:
        if os.access(place, os.X_OK):
            return str(place)
    looked = f"CUDA_HOME ({home})" if home else "CUDA_HOME (not set)"
    raise BuildError(
        f"no nvcc: looked in {looked}, on the PATH, for the pip package nvidia-cuda-nvcc, and in {USUAL_HOME}"
    )


def find_ninja() -> str:
    """From the PATH or the pip package ninja. Raises BuildError."""
    on_path = shutil.which("ninja")
    if on_path:
        return on_path
    try:
        from ninja import BIN_DIR  # the folder of scripts, which need not be on the PATH
    except ImportError:
        raise BuildError("no ninja: it is neither on the PATH nor installed as a package (pip install ninja)") from None
    return str(Path(BIN_DIR, "ninja"))


def _ask(nvcc: str, option: str) -> str:
    try:
        done = subprocess.run([nvcc, option], capture_output=True, text=True, timeout=60, check=True)
    except subprocess.CalledProcessError as error:
        said = (error.stderr or error.stdout).strip().splitlines()
        raise BuildError(f"{nvcc} {option} failed: {said[0] if said else f'exit code {error.returncode}'}") from error
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{nvcc} does not run: {error}") from error
    return done.stdout


def nvcc_version(nvcc: str) -> str:
    """ "13.0.88". Raises BuildError where the program does not run or says something else."""
    said = _ask(nvcc, "--version")
    match = re.search(r"\bV(\d+(?:\.\d+)+)", said)
    if match is None:
        raise BuildError(f"{nvcc} --version does not name a version: {said.strip().splitlines()[:1]}")
    return match[1]


def find_toolchain() -> Toolchain:
    """The tools of a build. Raises BuildError with the reason why there is none."""
    nvcc = find_nvcc()
    version = nvcc_version(nvcc)
    known = frozenset(re.findall(r"^compute_(\d+)$", _ask(nvcc, "--list-gpu-arch"), re.MULTILINE))
    return Toolchain(nvcc, find_ninja(), version, known)

"""What a build needs of this machine, nvcc and ninja, and for which GPUs it compiles."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

ARCHITECTURES_VARIABLE = "MEMFLOW_CUDA_ARCHS"
# The list is always explicit: it never depends on the GPU that is present.
DEFAULT = "8.0;8.6;8.9;9.0a;10.0a;12.0a"
OLDEST = (8, 0)  # Ampere: mma.sync in bfloat16, cp.async
_FORM = re.compile(r"(\d+)\.(\d)([af]?)(\+PTX)?")
USUAL_HOME = Path("/usr/local/cuda")


class BuildError(Exception):
    """The kernels cannot be built here, or their build failed; the message says why, in the compiler's own words."""


class Architecture(NamedTuple):
    """One entry of the list, "9.0", "9.0a" or "12.0+PTX".

    suffix "a": instructions of this chip alone; "f": those of its family. ptx: also code that newer chips translate.
    """

    major: int
    minor: int
    suffix: str = ""
    ptx: bool = False

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}{self.suffix}{'+PTX' if self.ptx else ''}"

    @property
    def number(self) -> str:
        """90 for 9.0a."""
        return f"{self.major}{self.minor}"

    def serves(self, capability: tuple[int, int]) -> bool:
        """Whether a GPU of this compute capability runs the code.

        Source: CUDA C++ Programming Guide, compute capabilities: machine code runs within its major version on equal
        or higher minor ones, that of "a" on its own chip alone, PTX on everything newer.
        """
        if self.suffix == "a":
            return capability == (self.major, self.minor)
        if self.ptx and not self.suffix and capability >= (self.major, self.minor):
            return True
        return capability[0] == self.major and capability[1] >= self.minor

    @property
    def flags(self) -> list[str]:
        """Options of nvcc."""
        name = self.number + self.suffix
        code = f"[sm_{name},compute_{name}]" if self.ptx else f"sm_{name}"
        return [f"-gencode=arch=compute_{name},code={code}"]


def parse(text: str, source: str = ARCHITECTURES_VARIABLE) -> tuple[Architecture, ...]:
    """The architectures of a list such as "8.0;9.0a"; "," and spaces also separate.

    Raises BuildError for anything else, for one older than 8.0 and for an empty list; `source` says where it came from.
    """
    found = []
    for word in re.split(r"[;,\s]+", text.strip("; ,\t\n")):
        match = _FORM.fullmatch(word)
        if match is None:
            raise BuildError(
                f"{source} has the entry {word!r} (in {text!r}); needed is a list like {DEFAULT!r}, "
                "with +PTX behind an entry that newer GPUs may translate"
            )
        architecture = Architecture(int(match[1]), int(match[2]), match[3], match[4] is not None)
        if architecture[:2] < OLDEST:
            raise BuildError(f"{source} has the entry {word!r}; the kernels need 8.0 (Ampere) or newer")
        if architecture not in found:
            found.append(architecture)
    return tuple(found)


def architectures(known: Collection[str], compiler: str) -> tuple[Architecture, ...]:
    """What to compile for: MEMFLOW_CUDA_ARCHS, which must be known to the compiler, or what it knows of the default.

    known: the numbers that it knows, "80", "90", ...; compiler: its name, for the messages.
    """
    wished = os.environ.get(ARCHITECTURES_VARIABLE, "").strip()
    if wished:
        chosen = parse(wished)
        unknown = [str(architecture) for architecture in chosen if architecture.number not in known]
        if unknown:
            raise BuildError(f"{ARCHITECTURES_VARIABLE} asks for {', '.join(unknown)}, unknown to {compiler}")
        return chosen
    chosen = tuple(architecture for architecture in parse(DEFAULT) if architecture.number in known)
    if not chosen:
        raise BuildError(f"{compiler} knows none of {DEFAULT}")
    return chosen


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

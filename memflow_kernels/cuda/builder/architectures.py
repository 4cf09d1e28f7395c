"""For which GPUs the kernels are compiled. The list is always explicit: it never depends on the GPU that is present."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from typing import NamedTuple

from .errors import BuildError

ARCHITECTURES_VARIABLE = "MEMFLOW_CUDA_ARCHS"
DEFAULT = "8.0;8.6;8.9;9.0a;10.0a;12.0a"
OLDEST = (8, 0)  # Ampere: mma.sync in bfloat16, cp.async
_FORM = re.compile(r"(\d+)\.(\d)([af]?)(\+PTX)?")


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

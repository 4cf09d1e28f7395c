"""A compiler that compiles nothing, for tests of everything around it."""

from __future__ import annotations

from pathlib import Path

import memflow_kernels

SCRIPT = """#!/bin/sh
case "$1" in
--version) echo "Cuda compilation tools, release {release}, V{version}"; exit 0 ;;
--list-gpu-arch) for number in {known}; do echo "compute_$number"; done; exit 0 ;;
esac
all="$*"
while [ $# -gt 0 ]; do [ "$1" = "-o" ] && out="$2"; shift; done
{action}
echo "$all" > "$out"
"""

# A process that builds the sources in its first argument, without the torch that the package would import.
BUILD_CODE = f"""
import pathlib, sys
sys.path.insert(0, {str(Path(memflow_kernels.__file__).parent / "cuda")!r})
from builder import Recipe, cached_library, find_toolchain
from builder.toolchain import parse
print(cached_library(Recipe(pathlib.Path(sys.argv[1]), find_toolchain(), parse("8.0"), pathlib.Path("/torch"))))
"""


def fake_nvcc(path: Path, action: str = "", version: str = "13.0.88", known: str = "80 86 89 90 100 120") -> Path:
    """Write it to `path`. action: shell lines run per file; $out is what it should make, $all how it was called."""
    path.parent.mkdir(parents=True, exist_ok=True)
    release = ".".join(version.split(".")[:2])
    new = path.with_suffix(".new")
    new.write_text(SCRIPT.format(release=release, version=version, known=known, action=action))
    new.chmod(0o755)
    new.replace(path)  # another process may be running the old one
    return path


def sources(folder: Path) -> Path:
    """A folder of three source files and a header."""
    folder.mkdir()
    for name in ("bindings.cpp", "means.cu", "attention.cu", "launch.h"):
        (folder / name).write_text(f"// {name}\n")
    return folder

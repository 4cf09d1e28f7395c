"""The kernels compiled by the nvcc of this machine, once for all test processes; what ptxas and cuobjdump say."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from memflow_kernels.cuda.builder import (
    BuildError,
    Recipe,
    compile_library,
    find_toolchain,
    source_folder,
    torch_folder,
)
from memflow_kernels.cuda.builder.toolchain import parse

NAME = "memflow_cuda.abi3.so"


def build(tmp_path_factory: pytest.TempPathFactory, architecture: str) -> Path:
    """The folder with the library for one architecture, memflow_cuda.abi3.so, and build.log; ptxas tells its resources.

    Skips the test where this machine has no nvcc.
    """
    try:
        toolchain = find_toolchain()
    except BuildError as error:
        pytest.skip(str(error))
    targets = parse(architecture)
    if targets[0].number not in toolchain.known:
        pytest.skip(f"{toolchain} does not know {architecture}")
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if os.environ.get("PYTEST_XDIST_WORKER") else shared
    folder = shared / f"nvcc-{architecture}"
    with open(shared / f"nvcc-{architecture}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            folder.mkdir()
            recipe = Recipe(source_folder(), toolchain, targets, torch_folder())
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("NVCC_APPEND_FLAGS", "-Xptxas=-v")
                compile_library(recipe, folder, NAME)
    if not (folder / NAME).exists():
        pytest.fail(f"the build failed, see the first test that needs it; {folder / 'build.log'}")
    return folder


class Resources(NamedTuple):
    """What one kernel takes: registers per thread, bytes of spills and stack, and of static shared memory."""

    file: str
    kernel: str  # its name in the object file
    registers: int
    spilled: int
    shared: int


def resources(log: str) -> list[Resources]:
    """From what ninja and `ptxas -v` said: the name of each object, and then its kernels."""
    rows, file = [], ""
    for line in log.splitlines():
        if made := re.search(r"^\[\d+/\d+\].* -o (\S+)\.o", line):
            file = made[1]
        if begun := re.search(r"Compiling entry function '(\w+)'", line):
            rows.append(Resources(file, begun[1], 0, 0, 0))
        if "bytes spill" in line:
            rows[-1] = rows[-1]._replace(spilled=sum(map(int, re.findall(r"(\d+) bytes", line))))
        if used := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            rows[-1] = rows[-1]._replace(registers=int(used[1]), shared=int(shared[1]) if shared else 0)
    return rows


def readable(names: list[str]) -> list[str]:
    """Kernel names as in the source, without their arguments; as they are where there is no c++filt."""
    program = shutil.which("c++filt")
    if program is None:
        return names
    said = subprocess.run([program], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    plain = (re.sub(r"^void |\(anonymous namespace\)::|memflow::|\(\w+\)|\b__", "", line) for line in said.splitlines())
    return [name.partition("(")[0] for name in plain]


def table(rows: list[Resources]) -> str:
    names = readable([row.kernel for row in rows])
    lines = [f"{'file':14} {'registers':>9} {'spilled':>7} {'shared':>6}  kernel"]
    lines += sorted(
        f"{row[0]:14} {row[2]:9} {row[3]:7} {row[4]:6}  {name}" for row, name in zip(rows, names, strict=True)
    )
    return "\n".join(lines)


def machine_code(file: Path) -> dict[str, str]:
    """Of a library or object file: name of each kernel -> its instructions, by cuobjdump, which triton brings too."""
    triton = pytest.importorskip(
        "triton", reason="no cuobjdump: the package triton, which brings one, is not installed"
    )
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    program = shutil.which("cuobjdump") or str(tools / "cuobjdump")
    environment = {**os.environ, "PATH": f"{os.environ['PATH']}{os.pathsep}{tools}"}  # it runs nvdisasm
    said = subprocess.run([program, "-sass", file], capture_output=True, text=True, check=True, env=environment).stdout
    return {part.split(maxsplit=1)[0]: part for part in said.split("Function : ")[1:]}

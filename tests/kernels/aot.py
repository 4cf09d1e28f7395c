"""Compile the Triton kernels for a GPU that need not be here: `python tests/kernels/aot.py sm_90` prints what came out.

The ops run on tensors of real sizes that have no memory. Every launch is compiled for the chip, specialised as Triton
would do it there, and not launched. Whatever reads a tensor on the host fails.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import json
import pkgutil
import re
import subprocess
import tempfile
import time
from pathlib import Path

import torch
import triton
from aot_cases import CASES
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import memflow_kernels.triton as kernels
from memflow_kernels.triton import configs

TARGETS = {
    **{f"sm_{number}": GPUTarget("cuda", number, 32) for number in (80, 89, 90, 100, 120)},
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Driver:
    """Stands in for the driver of the chip: says what it is and does nothing."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


class Used(dict):
    """A dictionary that remembers which keys were looked up."""

    def __init__(self, items):
        super().__init__(items)
        self.keys_used = set()

    def __getitem__(self, key):
        self.keys_used.add(key)
        return super().__getitem__(key)


def resources(kernel) -> dict[str, int]:
    """registers, spilled (bytes per thread on the stack; registers on AMD), shared memory and instructions of note."""
    found = {"shared": kernel.metadata.shared}
    if "amdgcn" in kernel.asm:
        listing = kernel.asm["amdgcn"]
        number = lambda name: int(re.search(rf"\.{name}:\s+(\d+)", listing)[1])  # noqa: E731
        return found | {"registers": number("vgpr_count"), "spilled": number("vgpr_spill_count")}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [TOOLS / "cuobjdump", "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    ptx = kernel.asm["ptx"]
    return found | {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spilled": int(re.search(r"STACK:(\d+)", usage)[1]) + int(re.search(r"LOCAL:(\d+)", usage)[1]),
        "wgmma": ptx.count("wgmma.mma_async"),
        "tcgen05": ptx.count("tcgen05.mma"),
        "bulk": ptx.count("cp.async.bulk.tensor"),
        "async": len(re.findall(r"cp\.async\.c[ag]", ptx)),
    }


def every_kernel() -> set[str]:
    """Names of all kernels of the backend."""
    names = set()
    for module in pkgutil.iter_modules(kernels.__path__):
        contents = vars(importlib.import_module(f"{kernels.__name__}.{module.name}")).values()
        names |= {x.__name__ for x in contents if isinstance(x, JITFunction)}
    return {name for name in names if name.endswith("_kernel")}


def compile_for(chip: str, patterns: list[str]) -> dict[str, object]:
    """Compile what the cases whose names match one of the patterns launch on `chip`.

    rows: one dictionary per distinct kernel; kernels, configs: the names that were never used.
    """
    triton.runtime.driver.set_active(Driver(TARGETS[chip]))
    configs._gpu_family = lambda index: chip
    configs._gpu_multiprocessors = lambda index: 132
    configs.TABLE = Used(configs.TABLE)
    torch.Tensor.data_ptr = lambda x: x.storage_offset() * x.element_size()
    rows, seen, launch = [], set(), JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        start = time.perf_counter()
        compiled = launch(self, *args, grid=grid, warmup=True, **options)
        if id(compiled) in seen:
            return
        seen.add(id(compiled))
        metadata = compiled.metadata
        row = {"chip": chip, "case": case, "kernel": self.__name__, "warps": metadata.num_warps}
        row |= {"stages": metadata.num_stages, "seconds": round(time.perf_counter() - start, 1)}
        rows.append(row | resources(compiled))

    JITFunction.run = compile_only
    for case, run in CASES.items():
        if any(fnmatch.fnmatch(case, pattern) for pattern in patterns):
            run(kernels)
    launched = {row["kernel"] for row in rows}
    return {
        "rows": rows,
        "kernels": sorted(every_kernel() - launched),
        "configs": sorted(set(configs.TABLE) - configs.TABLE.keys_used),
    }


def table(rows: list[dict]) -> str:
    """The rows as text."""
    columns = ("chip", "kernel", "case", "warps", "stages", "registers", "spilled", "shared", "seconds")
    extra = ("wgmma", "tcgen05", "bulk", "async")
    lines = [(*columns, "instructions")]
    for row in rows:
        noted = " ".join(f"{name} {row[name]}" for name in extra if row.get(name))
        lines.append((*(str(row[column]) for column in columns), noted))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    padded = ([x.ljust(width) for x, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join("  ".join(line).rstrip() for line in padded)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("chip", choices=TARGETS)
    parser.add_argument("--cases", nargs="*", default=["*"], help="patterns of the names in aot_cases.CASES")
    parser.add_argument("--json", action="store_true", help="one JSON object in place of a table")
    arguments = parser.parse_args()
    result = compile_for(arguments.chip, arguments.cases)
    print(json.dumps(result) if arguments.json else table(result["rows"]))

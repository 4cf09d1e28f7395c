"""Compiles the attention forward for Hopper, without one: `python tests/kernels/gluon_compile.py FOLDER VARIANT...`.

A variant is FORMAT-HEADSIZE, with "-exact" behind it for TRITON_DEFAULT_FP_FUSION=0, "-pipelined" for the kernel of
triton/attention.py in place of the one with roles for warps, and "-blackwell" for the next chip. Every cubin goes to
FOLDER; the resources of all are printed as JSON. Triton must compile, not interpret.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import aot
import torch
import triton
from triton.runtime.jit import JITFunction

import memflow_kernels.triton as kernels
from memflow_kernels.triton import configs
from memflow_kernels.triton.attention import planned

FULL = 1560  # tokens of a frame at 480 x 832
FORMATS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def compile_variant(variant: str, folder: Path) -> dict[str, int]:
    """Compile one variant for the shape that counts, 3 of 6 frames and 9 more; resources of its forward kernel."""
    dtype, head_dim, *options = variant.split("-")
    os.environ["TRITON_DEFAULT_FP_FUSION"] = "0" if "exact" in options else "1"
    chip = "sm_100" if "blackwell" in options else "sm_90"
    triton.runtime.driver.set_active(aot.Driver(aot.TARGETS[chip]))
    configs._gpu_family = lambda index: chip
    planned.cache_clear()
    found, chosen = {}, configs.SPECIALISED
    configs.SPECIALISED = chosen | configs.SPECIALISED_UNTIMED
    if "pipelined" in options:
        configs.SPECIALISED = {"any": {}}

    def compile_only(self, *arguments, grid, warmup, **constants):
        compiled = launch(self, *arguments, grid=grid, warmup=True, **constants)
        if self.__name__.startswith("forward"):
            (folder / f"{variant}.cubin").write_bytes(compiled.asm["cubin"])
            found.update(aot.resources(compiled), kernel=self.__name__)

    def states(frames: int) -> torch.Tensor:
        shape = (1, frames * FULL, 12, int(head_dim))
        return torch.empty(shape, dtype=FORMATS[dtype], device="meta")

    JITFunction.run, launch = compile_only, JITFunction.run
    try:
        frame_table = torch.empty((1, 12, 3), dtype=torch.int32, device="meta")
        kernels.memory_attention(states(3), states(15), states(15), frame_table, FULL, 6, 0.1, None)
    finally:
        JITFunction.run, configs.SPECIALISED = launch, chosen
    return found


def compile_all(folder: Path, *variants: str) -> dict[str, dict[str, int]]:
    """Resources of every variant; the process can launch nothing afterwards."""
    configs._gpu_multiprocessors = lambda index: 132
    torch.Tensor.data_ptr = lambda x: x.storage_offset() * x.element_size()
    return {variant: compile_variant(variant, folder) for variant in variants}


if __name__ == "__main__":
    print(json.dumps(compile_all(Path(sys.argv[1]), *sys.argv[2:])))

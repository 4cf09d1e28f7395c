"""Launch configurations: block sizes, warps and pipeline depth of every kernel, per family of GPUs.

One table, looked up at every launch; nothing is tuned at run time, so that a CUDA graph can capture any call.
How each row was chosen is said beside it. "compiled": read from the machine code (registers, spills, shared memory),
not timed on that chip.
"""

from __future__ import annotations

import functools
from typing import NamedTuple, TypeVar

import torch

Entry = TypeVar("Entry")


class Config(NamedTuple):
    """blocks: the kernel's constexpr block sizes by name; warps per program; stages of the software pipeline.

    resident: programs that fit on one multiprocessor together, by which a persistent grid is sized. descriptors: keys
    and values come by the bulk copies of tensor descriptors, where their memory layout allows it.
    """

    blocks: dict[str, int]
    warps: int = 4
    stages: int = 1
    resident: int = 1
    descriptors: bool = False

    @property
    def options(self) -> dict[str, int]:
        """The keyword arguments of a launch."""
        return {**self.blocks, "num_warps": self.warps, "num_stages": self.stages}


# Shared memory that one program may use, in bytes.
SHARED_MEMORY = {
    "sm_80": 163 * 1024,  # Ampere: A100
    "sm_89": 99 * 1024,  # Ada (L4, RTX 40) and the smaller Ampere chips
    "sm_90": 227 * 1024,  # Hopper: H100, H200
    "sm_100": 227 * 1024,  # Blackwell: B200
    "sm_120": 99 * 1024,  # Blackwell: RTX 50
    "gfx942": 64 * 1024,  # MI300
}

# Who attends: "triton" (our kernel), or torch's "cudnn" or "flash" where those take the format and head size.
DENSE = {"any": "triton"}  # calls without a frame table
CHOSEN = {"any": "triton"}  # calls with one; for torch's kernels the chosen frames are first gathered next to the rest

# kernel -> family -> Config; "any" serves the families that are not named.
TABLE: dict[str, dict[str, Config]] = {
    # Streams of bytes: enough programs for every multiprocessor at one frame of 12 heads x 128 (48 per frame), rows of
    # 64 bytes, all of a DRAM burst. Compiled.
    "means": {"any": Config({"BLOCK_TOKENS": 128, "BLOCK_DIM": 32}, warps=4, stages=3)},
    # 12 heads x 128 fill a tile of 16 x 128: one token at a time; smaller models take several, up to TILE numbers, and
    # larger ones more warps (32 heads and up: 16). 12 tokens per program are 130 programs for a frame of 1560, 2.95 per
    # multiprocessor of an H100 for three frames. Compiled: 12 heads x 128 spill nowhere, 40 heads 72 bytes on sm_90.
    "norm_rope": {"any": Config({"TILE": 1024, "PIECE": 512, "MOST_PIECES": 3, "RUN": 12}, warps=4, stages=2)},
    "norm_rope_backward": {"any": Config({"TILE": 1024, "RUN": 12}, warps=4, stages=2)},
    # A few kilobytes: one warp needs no barrier for its reductions. Compiled.
    "select": {"any": Config({"BLOCK_TILE": 512}, warps=1)},
    # 16 bytes per thread and load in half precision, two loads each. Compiled.
    "replace": {"any": Config({"BLOCK": 4096}, warps=8)},
    # Bytes only, once per chunk: 16 bytes per thread and load in half precision. Not timed.
    "rotation": {"any": Config({"TILE": 1024}, warps=4)},
    # Called once per chunk. In half precision the products of the forward run on the tensor cores; those of the
    # backward, which only training needs, are exact float32 products. Compiled.
    "relevance_score": {"any": Config({"BLOCK_HEADS": 16}, warps=4)},
    "relevance_share": {"any": Config({"BLOCK_TILE": 2048}, warps=4)},
    "relevance_token": {"any": Config({"BLOCK_TEXT": 32, "BLOCK_FRAMES": 32, "BLOCK_DIM": 64}, warps=4, stages=2)},
    # One program per row, most often one in all: enough loads on their way for a single multiprocessor. Compiled.
    "cover": {"any": Config({"BLOCK_TILE": 4096}, warps=8)},
    "relevance_lse_half": {"any": Config({"BLOCK_TEXT": 64, "BLOCK_KEYS": 64}, warps=4, stages=2)},
    "relevance_lse_float32": {"any": Config({"BLOCK_TEXT": 32, "BLOCK_KEYS": 32}, warps=8)},
    "relevance_gradient": {"any": Config({"BLOCK_TEXT": 32, "BLOCK_KEYS": 32}, warps=8)},
    # Bytes only: 32 rows of 128 channels from each side are 16 bytes per thread and load, four loads each. Compiled.
    "merge": {"any": Config({"ROWS": 32}, warps=4)},
    # Whole rows of 128 channels, 16 bytes per thread; twice as many bytes in flight as one tile of the norm.
    "gather": {"any": Config({"BN": 32}, warps=4)},
    # attention_*_S: half precision with heads of up to S channels; float32: exact products, without tensor cores. "any"
    # fits 99 KiB and reads by pointers; it also serves chips with descriptors where a layout cannot be described.
    # Forward: the largest tiles that compile without a spill. Compiled.
    "attention_forward_64": {
        "any": Config({"BM": 128, "BN": 64}, warps=8, stages=3),
        "sm_90": Config({"BM": 128, "BN": 128}, warps=8, stages=3, descriptors=True),
        "sm_100": Config({"BM": 128, "BN": 128}, warps=8, stages=3, descriptors=True),
        "gfx942": Config({"BM": 128, "BN": 64}, warps=4, stages=1, resident=2),
    },
    "attention_forward_128": {
        "any": Config({"BM": 128, "BN": 64}, warps=8, stages=2),
        "sm_80": Config({"BM": 128, "BN": 64}, warps=8, stages=3),
        "sm_90": Config({"BM": 128, "BN": 128}, warps=8, stages=3, descriptors=True),
        "sm_100": Config({"BM": 128, "BN": 64}, warps=8, stages=3, descriptors=True),  # 128 x 128 spills
        "gfx942": Config({"BM": 128, "BN": 64}, warps=8, stages=1),
    },
    "attention_forward_256": {
        "any": Config({"BM": 64, "BN": 32}, warps=8, stages=2),
        "sm_80": Config({"BM": 128, "BN": 32}, warps=8, stages=2),
        "sm_90": Config({"BM": 128, "BN": 64}, warps=8, stages=2, descriptors=True),
        "sm_100": Config({"BM": 128, "BN": 32}, warps=8, stages=2, descriptors=True),
        "gfx942": Config({"BM": 64, "BN": 32}, warps=4, stages=1),
    },
    "attention_forward_float32_64": {"any": Config({"BM": 64, "BN": 32}, warps=8)},
    "attention_forward_float32_128": {"any": Config({"BM": 64, "BN": 32}, warps=8)},
    "attention_forward_float32_256": {"any": Config({"BM": 32, "BN": 16}, warps=4)},
    # Backward: both kernels hold two tiles of results or operands more than the forward. Compiled.
    "attention_backward_query_64": {"any": Config({"BM": 64, "BN": 32}, warps=4, stages=2)},
    "attention_backward_query_128": {
        "any": Config({"BM": 64, "BN": 64}, warps=8, stages=2),
        "sm_90": Config({"BM": 128, "BN": 64}, warps=8, stages=2),
        "gfx942": Config({"BM": 64, "BN": 32}, warps=4),
    },
    "attention_backward_query_256": {
        "any": Config({"BM": 32, "BN": 32}, warps=8),
        "gfx942": Config({"BM": 32, "BN": 16}, warps=8),
    },
    "attention_backward_query_float32_64": {"any": Config({"BM": 32, "BN": 32}, warps=4)},
    "attention_backward_query_float32_128": {"any": Config({"BM": 16, "BN": 32}, warps=8)},
    "attention_backward_query_float32_256": {"any": Config({"BM": 16, "BN": 16}, warps=4)},
    "attention_backward_key_64": {"any": Config({"BM": 32, "BN": 64}, warps=4, stages=2)},
    "attention_backward_key_128": {
        "any": Config({"BM": 32, "BN": 64}, warps=8, stages=2),
        "sm_90": Config({"BM": 32, "BN": 128}, warps=8, stages=2),
        "gfx942": Config({"BM": 32, "BN": 64}, warps=4),
    },
    "attention_backward_key_256": {"any": Config({"BM": 16, "BN": 32}, warps=8)},
    "attention_backward_key_float32_64": {"any": Config({"BM": 16, "BN": 32}, warps=8)},
    "attention_backward_key_float32_128": {"any": Config({"BM": 16, "BN": 32}, warps=8)},
    "attention_backward_key_float32_256": {"any": Config({"BM": 16, "BN": 16}, warps=8)},
}

# Attention forward in half precision with warps of their own for loads and for products (gluon/), where that kernel
# attends: family -> head size -> Config. As many stages as fit. Hopper: chosen by its machine code (docs/kernels.md).
SPECIALISED: dict[str, dict[int, Config]] = {
    "any": {},
    "sm_90": {64: Config({"BN": 128}, stages=4), 128: Config({"BN": 128}, stages=3)},
}
# The same for Blackwell: compiled, and run on the CPU by the tests. A committed measurement will move it up.
SPECIALISED_UNTIMED = {"sm_100": {64: Config({"BN": 128}, stages=4), 128: Config({"BN": 128}, stages=2)}}


@functools.cache
def _gpu_family(index: int) -> str:
    if torch.version.hip:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(index)
    if major == 8:
        return "sm_80" if minor == 0 else "sm_89"
    return {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, "sm_120")


def family(device: torch.device) -> str:
    """The row of the table for `device`; the interpreter, which runs on the CPU, takes that of Ampere."""
    return "sm_80" if device.type == "cpu" else _gpu_family(torch.device(device).index or 0)


@functools.cache
def _gpu_multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(device: torch.device) -> int:
    """How many programs run side by side: what a persistent grid is sized by. The interpreter runs one at a time."""
    return 4 if device.type == "cpu" else _gpu_multiprocessors(torch.device(device).index or 0)


def of_family(rows: dict[str, Entry], device: torch.device) -> Entry:
    """The entry for `device` of DENSE, CHOSEN or SPECIALISED."""
    return rows.get(family(device), rows["any"])


def config(kernel: str, device: torch.device) -> Config:
    """The configuration of `kernel` on `device`."""
    rows = TABLE[kernel]
    return rows.get(family(device), rows["any"])

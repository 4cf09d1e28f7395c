"""The kernels that only move bytes, as compiled: `python tests/kernels/byte_code.py` prints how many programs a call of
the model launches, how much of them works, and what the loop over tokens costs, read from the machine code.

Tensors have the model's layouts: queries, keys and values as the linear layers leave them, the pool with a head's
tokens side by side. Nothing is launched and no GPU is needed.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import tempfile
from typing import NamedTuple

import torch

LAYERS, FRAMES, CHUNK, CANDIDATES, TOP_K = 30, 15, 3, 6, 3
ROWS, COLS = 30, 52
TOKENS = ROWS * COLS
# name -> heads x 128: Wan 2.1 1.3B, and 14B
MODELS = {"1.3B": 12, "14B": 40}
HEAD_DIM = 128


class Instruction(NamedTuple):
    """address: its place in the kernel; text: with its predicate, as nvdisasm writes it."""

    address: int
    text: str


def instructions(listing: str) -> list[Instruction]:
    """The instructions of one kernel, from what `cuobjdump -sass` said of it."""
    return [
        Instruction(int(address, 16), text.strip())
        for address, text in re.findall(r"/\*([0-9a-f]{4,6})\*/\s+([^;]*);", listing)
    ]


def loops(code: list[Instruction]) -> list[list[Instruction]]:
    """The instructions between each branch backwards and its target, loops inside of others too."""
    spans = []
    for address, text in code:
        back = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if back and int(back[1], 16) < address:
            spans.append((int(back[1], 16), address))
    return [[x for x in code if first <= x.address <= last] for first, last in spans]


def count(code: list[Instruction], pattern: str) -> int:
    return sum(bool(re.search(pattern, text)) for _, text in code)


def hot_loop(code: list[Instruction]) -> list[Instruction]:
    """The loop over tokens: the shortest that stores the most 16 bytes; all of the code where no loop stores any."""
    storing = [loop for loop in loops(code) if count(loop, r"\bSTG\b\S*\.128")]
    return min(storing, key=lambda loop: (-count(loop, r"\bSTG\b\S*\.128"), len(loop)), default=code)


def described(code: list[Instruction]) -> dict[str, int]:
    """What the tests ask for: the loop's length, accesses of global memory by width, scalar conversions, barriers."""
    loop = hot_loop(code)
    return {
        "instructions": len(code),
        "loop": len(loop),
        "wide": count(code, r"\b(LDG|STG|LDGSTS)\b\S*\.128"),
        "narrow": count(loop, r"\b(LDG|STG|LDGSTS)\b(?!\S*\.128)"),
        "scalar conversions": count(code, r"\bF2F\.(BF16|F16)"),
        "barriers": count(loop, r"\bBAR\b"),
        "local": count(code, r"\b(LDL|STL)\b"),
    }


def disassembled(cubin: bytes) -> list[Instruction]:
    import aot

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [aot.TOOLS / "cuobjdump", "-sass", file.name]
        return instructions(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def pool(heads: int, batch: int = 1):
    """Key, value and means of a pool as the model makes it."""
    from memflow_kernels import Pool

    return Pool.zeros(batch, FRAMES, TOKENS, heads, HEAD_DIM, dtype=torch.bfloat16, device="meta")


def projected(heads: int) -> torch.Tensor:
    """[1, L, H, D], as a linear layer leaves a chunk."""
    return torch.empty((1, CHUNK * TOKENS, heads, HEAD_DIM), dtype=torch.bfloat16, device="meta")


def numbers(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.int32, device="meta")


def replace_frame(kernels, heads):
    kernels.replace_frame(*pool(heads, LAYERS), numbers(LAYERS), numbers(LAYERS))


def gather_frames(kernels, heads):
    kernels.gather.gather_frames(*pool(heads)[:2], numbers(1, heads, TOP_K), TOKENS, CANDIDATES)


def gather_beside_the_window(kernels, heads):
    """The chosen frames alone, into slots of the pool itself."""
    held = pool(heads)
    first, last = CANDIDATES * TOKENS, (CANDIDATES + TOP_K) * TOKENS
    candidates, scratch = ([part[:, tokens] for part in held[:2]] for tokens in (slice(0, first), slice(first, last)))
    kernels.gather.gather_into(*candidates, numbers(1, heads, TOP_K), TOKENS, CANDIDATES, *scratch)


def frame_means(kernels, heads):
    kernels.frame_means(pool(heads).key[:, : CANDIDATES * TOKENS], TOKENS)


def qk_norm_rope_write(kernels, heads):
    query, key, value = (projected(heads) for _ in range(3))
    weights = [torch.empty(heads * HEAD_DIM, dtype=torch.bfloat16, device="meta")] * 2
    place = (1e-6, ROWS, COLS, 7, None)
    for query_mean in (False, True):
        kernels.qk_norm_rope_write(query, key, value, *weights, *place, *pool(heads), numbers(CHUNK), query_mean)


def steps(tokens: int, at_once: int) -> int:
    """Tokens that a loop covers, those past the end included."""
    return math.ceil(tokens / at_once) * at_once


# kernel -> (elements that have to be moved or read by one launch, elements that one of its programs covers)
def elements(op: str, kernel: str, heads: int, blocks: dict[str, int]) -> tuple[int, int]:
    per_frame = TOKENS * heads * HEAD_DIM
    if kernel == "replace_kernel":
        return LAYERS * per_frame, blocks["RUNS"] * blocks["BLOCK"]
    if kernel == "gather_kernel":
        frames = TOP_K if op == "gather_beside_the_window" else FRAMES - CANDIDATES + TOP_K
        return frames * per_frame, blocks["BN"] * blocks["D_PAD"]
    if kernel == "means_kernel":
        return CANDIDATES * per_frame, steps(TOKENS, blocks["BLOCK_TOKENS"]) * blocks["BLOCK_DIM"]
    width = blocks["BLOCK_HEADS"] * blocks["PIECES"] * blocks["BLOCK_DIM"]
    return CHUNK * per_frame, steps(blocks["RUN"], blocks["BLOCK_TOKENS"]) * width


OPS = (replace_frame, gather_frames, gather_beside_the_window, frame_means, qk_norm_rope_write)
KERNELS = {"replace_kernel", "gather_kernel", "means_kernel", "norm_rope_kernel"}


def report(chip: str, models: list[str], ops: list[str]) -> list[dict]:
    """One row per launch of a byte-moving kernel. For a process of its own: the driver's stand-in stays."""
    import aot
    from triton.runtime.jit import JITFunction

    rows, launch = [], JITFunction.run
    now = {}

    def noted(self, *args, grid, **options):
        compiled = launch(self, *args, grid=grid, **options)
        if self.__name__ in KERNELS:
            blocks = {name: value for name, value in options.items() if name.isupper()}
            needed, covered = elements(now["op"], self.__name__, now["heads"], blocks)
            programs = math.prod(grid)
            warps = compiled.metadata.num_warps
            row = {**now, "kernel": self.__name__, "blocks": blocks, "programs": programs, "warps": warps}
            row |= {"covered": programs * covered / needed} | aot.resources(compiled)
            if "cubin" in compiled.asm:
                row |= described(disassembled(compiled.asm["cubin"]))
            rows.append(row)
        return compiled

    JITFunction.run = noted
    aot.CASES.clear()
    for model in models:
        for op in OPS:
            if op.__name__ in ops:

                def case(kernels, op=op, model=model):
                    now.update(model=model, op=op.__name__, heads=MODELS[model])
                    op(kernels, MODELS[model])

                aot.CASES[f"{op.__name__} {model}"] = case
    aot.compile_for(chip, ["*"])
    return rows


def table(rows: list[dict]) -> str:
    names = ("model", "kernel", "programs", "covered", "warps", "registers", "spilled", "shared")
    names += ("loop", "wide", "narrow", "scalar conversions", "barriers")
    lines = [names]
    for row in rows:
        shown = {**row, "covered": f"{row['covered']:.3f}"}
        lines.append(tuple(str(shown.get(name, "")) for name in names))
    widths = [max(len(line[column]) for line in lines) for column in range(len(names))]
    return "\n".join("  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)).rstrip() for line in lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chip", default="sm_90")
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=MODELS)
    parser.add_argument("--ops", nargs="*", default=[op.__name__ for op in OPS])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = report(arguments.chip, arguments.models, arguments.ops)
    print(json.dumps(found) if arguments.json else table(found))

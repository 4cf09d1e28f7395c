"""Half-precision numbers two at a time, as NVIDIA's instructions convert them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .configs import family


def nvidia(device: torch.device) -> bool:
    """Whether kernels for `device` are compiled for a GPU by NVIDIA."""
    return device.type != "cpu" and family(device).startswith("sm_")


@triton.jit
def widened(x, NVIDIA: tl.constexpr):
    """x in float32, for numbers that were just rounded and are stored as well.

    A number that is used twice is rounded alone, by an instruction of a quarter of the rate (F2F). Unpacked from pairs
    in registers, all are rounded in pairs. Elsewhere (other vendors, the interpreter) a plain cast.
    """
    if NVIDIA and x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x], tl.float32, is_pure=True, pack=2
        )
    elif NVIDIA and x.dtype == tl.float16:
        return tl.inline_asm_elementwise(
            "{ .reg .b16 low, high; mov.b32 {low, high}, $2; cvt.f32.f16 $0, low; cvt.f32.f16 $1, high; }",
            "=r,=r,r", [x], tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return x.to(tl.float32)

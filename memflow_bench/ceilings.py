"""What a machine can reach: the best of several shapes and types, so that nothing useful lies above it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .timing import Flush, sample

SAMPLES = 5
MIB = 2**20
# (batch, rows, columns, inner): square products, and those of attention, logits and outputs, a head each.
PRODUCTS = {
    "cpu": ((1, 1024, 1024, 1024), (1, 2048, 2048, 2048), (12, 1024, 2048, 128), (12, 1024, 128, 2048)),
    "cuda": ((1, 4096, 4096, 4096), (1, 8192, 8192, 8192), (1, 8192, 8192, 16384), (24, 4680, 4096, 128)),
}
COPIES = {"cpu": (4 * MIB, 32 * MIB, 256 * MIB), "cuda": (256 * MIB, 1024 * MIB, 4096 * MIB)}


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """flops: per second of the fastest of several matrix products. bytes: per second of the fastest of several copies,
    read and written.

    On a CPU the products are tried in float32 too: its attention kernels compute in that whatever the dtype, where half
    precision is slower. Copies that fit into caches count: what a kernel reads may lie there as well.
    """
    kinds = dict.fromkeys((dtype, torch.float32) if device.type == "cpu" else (dtype,))
    products = [_product(device, kind, shape) for kind in kinds for shape in PRODUCTS[device.type]]
    return {"flops": max(products), "bytes": max(_copy(device, size) for size in COPIES[device.type])}


def highest(one: dict[str, dict[str, float]], other: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Of ceilings measured twice, before and after: a machine may have been slower at either time."""
    return {
        dtype: {name: max(rate, other[dtype][name]) for name, rate in found.items()} for dtype, found in one.items()
    }


def _product(device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> float:
    batch, rows, columns, inner = shape
    a = torch.randn(batch, rows, inner, device=device).to(dtype)
    b = torch.randn(batch, inner, columns, device=device).to(dtype)
    return 2 * batch * rows * columns * inner / _fastest(lambda: torch.bmm(a, b), device, Flush(device))


def _copy(device: torch.device, size: int) -> float:
    source = torch.zeros(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / _fastest(lambda: target.copy_(source), device, None)


def _fastest(run: Callable[[], object], device: torch.device, flush: Flush | None) -> float:
    run()
    return min(sample(run, device, flush)[0] for _ in range(SAMPLES))

"""The random numbers of a stream: one generator per batch row, on the CPU.

So a row is the same in any batch and on any device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Noise:
    """seeds: one per batch row."""

    def __init__(self, seeds: Sequence[int]):
        self.generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]

    def __call__(self, shape: tuple[int, ...]) -> Tensor:
        """Standard normal numbers [B, *shape], float32, on the CPU."""
        return torch.stack([torch.randn(shape, generator=generator) for generator in self.generators])

    def state(self) -> Tensor:
        """[B, bytes] uint8."""
        return torch.stack([generator.get_state() for generator in self.generators])

    def set_state(self, state: Tensor) -> None:
        for generator, row in zip(self.generators, state, strict=True):
            generator.set_state(row)


def to_device(noise: Tensor, device: torch.device) -> Tensor:
    """`noise` on `device`; the host does not wait until it has arrived there."""
    if device.type == "cuda":
        return noise.pin_memory().to(device, non_blocking=True)
    return noise.to(device)

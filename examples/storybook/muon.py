"""Muon in float32: momentum whose matrices are made orthogonal before they are taken as steps.

Formula: Keller Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024), with the step size of
Liu et al., "Muon is scalable for LLM training" (arXiv 2502.16982), so that AdamW's learning rates fit.
`torch.optim.Muon` iterates in bfloat16 and one matrix at a time, which is slow on a CPU without bfloat16 units.
"""

from __future__ import annotations

import torch
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration
_ITERATIONS = 5


def orthogonal(matrices: Tensor) -> Tensor:
    """[n, rows, columns] -> about the nearest (semi-)orthogonal matrices: singular values between 0.7 and 1.2."""
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.transpose(1, 2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.transpose(1, 2) if tall else x


class Muon(torch.optim.Optimizer):
    """params: matrices. lr: as for AdamW. momentum: of the Nesterov kind. weight_decay: decoupled, times lr."""

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        if any(p.ndim != 2 for group in self.param_groups for p in group["params"]):
            raise ValueError("params must be matrices: others need another optimiser")

    @torch.no_grad()
    def step(self) -> None:
        """One step along the gradients."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for shape, alike in shapes.items():
                updates = orthogonal(torch.stack([self._direction(p, group["momentum"]) for p in alike]))
                rate = group["lr"] * 0.2 * max(shape) ** 0.5
                for p, update in zip(alike, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=rate)

    def _direction(self, p: Tensor, momentum: float) -> Tensor:
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        average = state["momentum"].lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(average, momentum)

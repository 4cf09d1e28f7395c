"""The few denoising steps of a distilled flow model: which noise levels, and the step between them.

Distilled streaming models are trained for given entries of the shifted training schedule and step by predicting the
clean latents and adding fresh noise (SEMANTICS: x0 = x - sigma v, then x = (1 - sigma') x0 + sigma' noise).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from memflow.errors import MemFlowError


class DistilledSchedule:
    """Noise levels of the steps.

    scheduler: a diffusers flow-matching scheduler, for its table `sigmas`: num_train_timesteps entries, shift applied.
    steps: unshifted timesteps in (0, num_train_timesteps], most noisy first, e.g. (1000, 750, 500, 250).
    """

    def __init__(self, scheduler, steps: Sequence[int]):
        total = scheduler.config.num_train_timesteps
        steps = tuple(int(step) for step in steps)
        if not steps or any(not 0 < step <= total for step in steps) or list(steps) != sorted(set(steps), reverse=True):
            raise MemFlowError(f"denoising_steps must fall from at most {total} to above 0, got {list(steps)}")
        table = getattr(scheduler, "sigmas", torch.zeros(0))
        if len(table) < total or not 0.999 <= float(table[0]) <= 1 or not (table[: total - 1] > table[1:total]).all():
            raise MemFlowError(
                f"scheduler must hold the {total} noise levels of flow matching, from 1 down, as "
                f"FlowMatchEulerDiscreteScheduler(shift=5.0) does, got {type(scheduler).__name__}"
            )
        self.sigmas = [float(table[total - step]) for step in steps]
        self.timesteps = [sigma * total for sigma in self.sigmas]

    def __len__(self) -> int:
        return len(self.sigmas)

    def clean(self, index: int, noisy: Tensor, flow: Tensor) -> Tensor:
        """Clean latents that `flow`, the model's output at step `index`, points to; float64 inside."""
        return (noisy.double() - self.sigmas[index] * flow.double()).to(noisy.dtype)

    def add_noise(self, index: int, clean: Tensor, noise: Tensor) -> Tensor:
        """`clean` at the noise level of step `index`."""
        sigma = torch.tensor(self.sigmas[index], dtype=clean.dtype)
        return (1 - sigma) * clean + sigma * noise

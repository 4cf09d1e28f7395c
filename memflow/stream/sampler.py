"""The few denoising steps of a distilled flow model, and the random numbers between them.

Distilled streaming models are trained for given entries of the shifted training schedule and step by predicting the
clean latents and adding fresh noise: x0 = x - sigma v, then x = (1 - sigma') x0 + sigma' noise.

diffusers' FlowMatchLCMScheduler computes the same, to 5e-8. It draws each noise inside its step, where a GPU's host
would wait for the copy four times a chunk, and counts its steps in the scheduler that all streams of a pipeline share.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from memflow.errors import MemFlowError


class DistilledSchedule:
    """Noise levels of the steps, and the step between them.

    Args:
        scheduler: a diffusers flow-matching scheduler, for its table `sigmas`: num_train_timesteps entries, shifted.
        steps: unshifted timesteps in (0, num_train_timesteps], most noisy first, e.g. (1000, 750, 500, 250).
        name: what errors call them.

    Raises:
        MemFlowError: steps that do not fall, or a scheduler without such a table.
    """

    def __init__(self, scheduler, steps: Sequence[int], name: str = "denoising_steps"):
        total = scheduler.config.num_train_timesteps
        steps = tuple(int(step) for step in steps)
        if not steps or any(not 0 < step <= total for step in steps) or list(steps) != sorted(set(steps), reverse=True):
            raise MemFlowError(f"{name} must fall from at most {total} to above 0, got {list(steps)}")
        table = getattr(scheduler, "sigmas", torch.zeros(0, device="cpu"))
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
        sigma = torch.tensor(self.sigmas[index], dtype=clean.dtype, device="cpu")
        return (1 - sigma) * clean + sigma * noise


class Noise:
    """The random numbers of a stream: one generator per batch row, on the CPU, so that a row is the same in any batch
    and on any device.

    Args:
        seeds: one per batch row.
    """

    def __init__(self, seeds: Sequence[int]):
        self.generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]

    def __call__(self, shape: tuple[int, ...]) -> Tensor:
        """Standard normal numbers [B, *shape], float32, on the CPU."""
        size = (len(self.generators), *shape)
        return randn_tensor(size, self.generators, torch.device("cpu"), torch.float32)

    def state(self) -> Tensor:
        """[B, bytes] uint8."""
        return torch.stack([generator.get_state() for generator in self.generators])

    def set_state(self, state: Tensor) -> None:
        """Go on where `state` was taken."""
        own = self.state()
        if state.shape != own.shape or state.dtype != own.dtype:
            raise ValueError(f"noise must be {own.dtype} {list(own.shape)}, got {state.dtype} {list(state.shape)}")
        for generator, row in zip(self.generators, state, strict=True):
            generator.set_state(row.clone())  # torch 2.13 reads beyond a view that begins later than its memory


def to_device(noise: Tensor, device: torch.device) -> Tensor:
    """`noise` on `device`; the host does not wait until it has arrived there."""
    if device.type == "cuda":
        return noise.pin_memory().to(device, non_blocking=True)
    return noise.to(device)

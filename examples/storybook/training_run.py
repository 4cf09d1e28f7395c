"""A training run: its optimizer, steps with a progress bar, a log, and checkpoints that resume bit by bit the same."""

from __future__ import annotations

import csv
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

_CHECKPOINT_SECONDS = 120.0
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration
_ITERATIONS = 5


def step_generator(seed: int, step: int) -> torch.Generator:
    """The random numbers of one training step, which depend on nothing but seed and step."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)


def learning_rate(step: int, steps: int, warmup: int = 50) -> float:
    """Share of the full learning rate: a linear warm-up, a plateau, and a linear way down over the last fifth."""
    return min(1.0, (step + 1) / warmup, 5 * (steps - step) / steps)


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Over the workers of a `torch.distributed` group, if there is one: then a step is one of all their examples."""
    if not dist.is_initialized():
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def worker() -> tuple[int, int]:
    """Number of this worker, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


class Run:
    """One stage of training, in a folder of its own: `log.csv` and `checkpoint.pt`.

    title: what the progress bar says. modules: name -> anything with state_dict and load_state_dict, all that changes.
    steps: in the whole run. advance: makes step number `step` and returns the numbers to log, floats by name.
    """

    def __init__(self, title: str, folder: Path, modules: dict, steps: int, advance: Callable[[int], dict[str, float]]):
        self.title, self.folder, self.modules, self.steps, self.advance = title, folder, modules, steps, advance
        self.step = 0
        self.rows: list[dict[str, float]] = []
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def done(self) -> bool:
        """Every step has been made."""
        return self.step >= self.steps

    def resume(self) -> bool:
        """Go on from the folder's checkpoint; False if there is none."""
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return False
        saved = torch.load(path, weights_only=True)
        for name, module in self.modules.items():
            module.load_state_dict(saved[name])
        self.step, self.rows = saved["step"], saved["rows"]
        return True

    def save(self) -> None:
        """Write checkpoint and log (the first worker does); only a complete checkpoint replaces one that is there."""
        if worker()[0]:
            return
        state = {name: module.state_dict() for name, module in self.modules.items()}
        partial = self.folder / "checkpoint.partial"
        torch.save({**state, "step": self.step, "rows": self.rows}, partial)
        os.replace(partial, self.folder / "checkpoint.pt")
        with open(self.folder / "log.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, ["step", *self.rows[0]] if self.rows else ["step"])
            writer.writeheader()
            writer.writerows({"step": i, **row} for i, row in enumerate(self.rows))

    def go(self, stop_at: float | None = None, stop_step: int | None = None, quiet: bool = False) -> None:
        """Make the steps that are left. stop_at: a `time.monotonic()` to stop at; stop_step: a step to stop before."""
        last = self.steps if stop_step is None else min(self.steps, stop_step)
        saved_at = time.monotonic()
        with self._bar(quiet) as bar:
            task = bar.add_task(self.title, total=self.steps, completed=self.step, numbers="")
            while self.step < last and (stop_at is None or time.monotonic() < stop_at):
                self.rows.append(self.advance(self.step))
                self.step += 1
                bar.update(task, completed=self.step, numbers=_short(self.rows[-20:]))
                if time.monotonic() - saved_at > _CHECKPOINT_SECONDS:
                    self.save()
                    saved_at = time.monotonic()
        self.save()

    @staticmethod
    def _bar(quiet: bool) -> Progress:
        console = Console(stderr=True)
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=quiet or not console.is_terminal,
        )


def _short(rows: list[dict[str, float]]) -> str:
    return "  ".join(f"{name} {sum(row[name] for row in rows) / len(rows):.3f}" for name in rows[0])


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
    """Muon in float32: momentum whose matrices are made orthogonal before they are taken as steps.

    Formula: Keller Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024), with the step size
    of Liu et al., "Muon is scalable for LLM training" (arXiv 2502.16982), so that AdamW's learning rates fit.
    `torch.optim.Muon` iterates in bfloat16 and one matrix at a time, which is slow on a CPU without bfloat16 units.

    params: matrices. lr: as for AdamW. momentum: of the Nesterov kind. weight_decay: decoupled, times lr."""

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

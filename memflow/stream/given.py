"""What a `ChunkDriver` is given: sentences for what does not fit, before anything has happened."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real

from torch import Tensor

from memflow.errors import MemFlowError


def check_size(size: Sequence[object]) -> None:
    """(B, h, w) must be whole numbers of at least 1."""
    if not all(isinstance(count, Integral) and count >= 1 for count in size):
        raise MemFlowError(f"latents: B, h and w must be whole numbers of at least 1, got {tuple(size)}")


def check_text(embeds: object, mask: object, dim: int, batch: int | None) -> None:
    """embeds [B, T, dim] and mask [B, T] or None, for `batch` stories where that is known."""
    if not isinstance(embeds, Tensor):
        raise MemFlowError(f"embeds must be a torch.Tensor [B, T, {dim}], got {type(embeds).__name__}")
    if embeds.ndim != 3 or embeds.shape[2] != dim or not embeds.shape[0]:
        raise MemFlowError(f"embeds must be [B, T, {dim}], got {list(embeds.shape)}")
    if batch not in (None, embeds.shape[0]):
        raise MemFlowError(f"embeds must be [{batch}, T, {dim}], one text for each story, got {list(embeds.shape)}")
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise MemFlowError(f"mask must be a torch.Tensor [B, T], got {type(mask).__name__}")
    if mask.shape != embeds.shape[:2]:
        raise MemFlowError(f"mask must be [B, T] = {list(embeds.shape[:2])}, got {list(mask.shape)}")


def check_latents(latents: object) -> None:
    """A tensor of floating-point numbers: in another the flow would be rounded to whole numbers."""
    if not isinstance(latents, Tensor):
        raise MemFlowError(f"latents must be a torch.Tensor, got {type(latents).__name__}")
    if not latents.is_floating_point():
        raise MemFlowError(f"latents must be floating-point numbers, got {latents.dtype}")


def one_timestep(timestep: object, batch: int) -> float | Tensor:
    """A number, or a tensor [B]. Schedulers have tensors of one number; it is read where that costs nothing."""
    if isinstance(timestep, Tensor):
        if timestep.shape not in ((), (1,), (batch,)):
            raise MemFlowError(f"timestep must be one number, or a tensor [B] = [{batch}], got {list(timestep.shape)}")
        if timestep.ndim or timestep.device.type != "cpu":
            return timestep.expand(batch)
        timestep = timestep.item()
    if isinstance(timestep, bool) or not isinstance(timestep, Real):
        raise MemFlowError(f"timestep must be a number or a tensor, got {type(timestep).__name__}")
    if not 0 <= timestep <= 1000:
        raise MemFlowError(f"timestep must be from 0 (clean) to 1000, got {timestep}")
    return float(timestep)

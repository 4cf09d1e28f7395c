"""What a pipeline and a `ChunkDriver` are given: sentences for what does not fit, before anything has happened."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from memflow.errors import MemFlowError
from memflow.memory.config import MemoryConfig

if TYPE_CHECKING:
    from memflow.memory.views import Prompt
    from memflow.models.base import VideoModel

_MOST = 2**20  # pixels of a side, tokens of a prompt


LONGEST = 1e7  # seconds of one prompt


class EncodedText(NamedTuple):
    """embeds: [B, T, text_dim]. mask: [B, T]. prompt: what the model has made of them."""

    embeds: Tensor
    mask: Tensor
    prompt: Prompt

    @classmethod
    def of(cls, model: VideoModel, embeds: Tensor, mask: Tensor, *, copy: bool = False) -> EncodedText:
        """The text for a model, where it is. copy: the caller may go on to write into embeds and mask."""
        text = embeds.to(model.device, model.dtype, copy=copy), mask.to(model.device, copy=copy)
        return cls(*text, model.encode_prompt(*text))


def one_seed_each(seed: int | Sequence[int], batch: int) -> list[int]:
    """A seed for each of `batch` stories: those that are given, or counted on from the one."""
    seeds = list(seed) if isinstance(seed, (list, tuple)) else [seed]
    for value in seeds:
        if isinstance(value, bool) or not isinstance(value, Integral) or not 0 <= value < 2**63:
            raise MemFlowError(f"seed must be a whole number from 0 to 2**63 - 1, got {value!r}")
    if isinstance(seed, (list, tuple)) and len(seeds) != batch:
        raise MemFlowError(f"seed must be one whole number or {batch} of them, one per story, got {len(seeds)}")
    if len(seeds) == batch:
        return [int(value) for value in seeds]
    if seeds[0] + batch > 2**63:
        raise MemFlowError(f"seed must be at most 2**63 - {batch}, {batch} stories count on from it, got {seeds[0]}")
    return [int(seeds[0]) + row for row in range(batch)]


def prompt_seconds(seconds: object) -> float:
    """How long a prompt's part of a video is."""
    if isinstance(seconds, bool) or not isinstance(seconds, Real) or not 0 < seconds <= LONGEST:
        raise MemFlowError(f"seconds_per_prompt must be above 0 and at most {LONGEST:g}, got {seconds!r}")
    return seconds


def whole_pixels(name: str, pixels: object, step: int) -> int:
    """A height or width that a model can make: a multiple of `step`."""
    if isinstance(pixels, bool) or not isinstance(pixels, Integral) or pixels < step or pixels % step:
        raise MemFlowError(f"{name} must be a positive multiple of {step} pixels for this model, got {pixels!r}")
    if pixels > _MOST:
        raise MemFlowError(f"{name} must be at most {_MOST:,} pixels, got 2**{int(pixels).bit_length() - 1} or more")
    return int(pixels)


def check_recorded(fps: object, text_length: object, height: object, width: object, memory: dict) -> None:
    """What a folder says of the model in it."""
    MemoryConfig.from_dict(memory)
    if isinstance(fps, bool) or not isinstance(fps, Real) or not 0.1 <= fps <= 1000:
        raise MemFlowError(f"fps must be a number from 0.1 to 1000, got {fps!r}")
    if isinstance(text_length, bool) or not isinstance(text_length, Integral) or not 1 <= text_length <= _MOST:
        raise MemFlowError(f"text_length must be a whole number from 1 to {_MOST:,}, got {text_length!r}")
    whole_pixels("height", height, 1), whole_pixels("width", width, 1)


def latent_size(size: Sequence[object]) -> tuple[int, int, int]:
    """(B, h, w), whole numbers of at least 1."""
    if not all(isinstance(count, Integral) and count >= 1 for count in size):
        raise MemFlowError(f"latents: B, h and w must be whole numbers of at least 1, got {tuple(size)}")
    return tuple(map(int, size))


def check_embeds(embeds: object, mask: object, dim: int, batch: int | None) -> None:
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


def check_shape(shape: Sequence[int], needed: Sequence[int]) -> None:
    """Latents of this shape must be `needed` [B, C, F] and h, w."""
    if len(shape) != 5 or list(shape[:3]) != list(needed):
        raise MemFlowError(f"latents must be [{', '.join(map(str, needed))}, h, w], got {list(shape)}")


def check_unchanged(pool: Tensor, model: VideoModel, *, dtype: bool) -> None:
    """The memory of a stream keeps the device and, where `dtype`, the dtype that its model had."""
    device = model.device
    if pool.device.type == device.type and None in (pool.device.index, device.index):
        device = pool.device
    for name, before, now in (("device", pool.device, device), ("dtype", pool.dtype, model.dtype))[: 1 + dtype]:
        if before != now:
            raise MemFlowError(
                f"the model's {name} has changed under a stream, from {before} to {now}: its memory keeps that of its "
                "first chunk; change it back, or make the stream again"
            )


def saved_position(counters: dict[str, int]) -> int:
    """Chunks kept, of a state; ValueError where it does not say."""
    position = counters.get("position")
    if not isinstance(position, int) or not 0 <= position < 2**48:
        raise ValueError(f"position must be a whole number, got {position!r}")
    return position


def saved_latents(tensors: dict[str, Tensor], needed: Sequence[int], model: VideoModel) -> Tensor | None:
    """Take the latents out of a state; ValueError where they are not `needed` [B, C, F, h, w]; None: F is 0."""
    latents = tensors.pop("history", None)
    found, needed = None if latents is None else list(latents.shape), list(needed) if needed[2] else None
    if found != needed:
        raise ValueError(f"history must be {needed}, got {found}")
    return None if latents is None else latents.to(model.device)


def saved_text(tensors: dict[str, Tensor], name: str, batch: int, model: VideoModel) -> EncodedText | None:
    """Take a prompt out of a state, if it has one; ValueError where the embeddings are not those of the model."""
    embeds, mask, dim = tensors.pop(f"{name}.embeds", None), tensors.pop(f"{name}.mask", None), model.text_dim
    if embeds is None:
        return None
    shape, rows = list(embeds.shape), None if mask is None else list(mask.shape)
    fits = len(shape) == 3 and shape == [batch, shape[1], dim] and rows == shape[:2] and mask.dtype == torch.bool
    if not fits or embeds.dtype != model.dtype:
        needed = f"{model.dtype} [{batch}, T, {dim}] with a mask"
        raise ValueError(f"{name}.embeds must be {needed}, got {shape} with {rows}")
    return EncodedText.of(model, embeds, mask)

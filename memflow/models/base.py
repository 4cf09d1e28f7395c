"""What a stream needs of a model: `VideoModel`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from memflow.memory.attention import Pass
    from memflow.memory.places import Rotation
    from memflow.memory.views import Prompt


class VideoModel(Protocol):
    """A causal video transformer with a key for every token, as `memflow.stream.chunks.ChunkDriver` calls it.

    The driver knows nothing else of a model: which layers it has, how it takes text, how it turns its keys. In
    `denoise` and `write_clean` every layer hands its new keys and values to the pool in `step` and attends to what is
    visible there; `memflow.memory.attention` does both. examples/own_model.py has a model of its own in one file.

    Attributes:
        layers: layers with a memory.
        heads: attention heads of a layer.
        head_dim: channels of a head.
        channels: channels of the latents.
        text_dim: channels of a text embedding.
        rotation: how its keys turn with time; None: they do not.
        dtype: of the keys and values in the memory.
        device: where the model computes.
    """

    layers: int
    heads: int
    head_dim: int
    channels: int
    text_dim: int
    rotation: Rotation | None
    dtype: torch.dtype
    device: torch.device

    def grid(self, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns of tokens in a latent frame of `rows` x `columns`; ValueError where they do not fit."""
        ...

    def encode_prompt(self, embeds: Tensor, mask: Tensor) -> Prompt:
        """Keys and values of a prompt, as each layer's text attention has them.

        Args:
            embeds: [B, T, text_dim] on `device`, rows of padding zero.
            mask: [B, T] bool, True where a token counts.
        """
        ...

    def text_version(self) -> Hashable:
        """Changes when `encode_prompt` would give something else, because of other weights for example; asked before
        every chunk. MemFlowError where the model was changed so that a stream cannot go on with it."""
        ...

    def denoise(self, latents: Tensor, timestep: float, step: Pass) -> Tensor:
        """The flow that the model predicts; overwrites what an earlier pass over the same frames left in the pool.

        Args:
            latents: [B, channels, F, h, w] on `device` in `dtype`, noisy.
            timestep: 0 (clean) to 1000, or a tensor [B].
            step: where the call stands in the stream.
        """
        ...

    def write_clean(self, latents: Tensor, step: Pass) -> None:
        """Put the keys and values of clean latents [B, channels, F, h, w] into the pool."""
        ...

    def identity(self) -> str:
        """A digest of all weights: equal for equal models only."""
        ...


_SAMPLES = 8  # numbers of every tensor


def sampled(tensors: Iterable[Tensor]) -> tuple[bytes, ...]:
    """Numbers from all over some tensors, on the host, to tell whether they have been written to: peft fuses adapters
    by writing through `weight.data`, of which torch keeps no count.

    Args:
        tensors: of any dtypes, on any devices.
    """
    groups = defaultdict(list)
    for tensor in tensors:
        count = min(_SAMPLES, tensor.numel())
        tensor = tensor.contiguous() if 0 in tensor.stride() else tensor  # expanded: fewer numbers in memory
        sample = tensor.detach().as_strided((count,), (tensor.numel() // max(1, count),))
        groups[tensor.dtype, tensor.device].append(sample)
    return tuple(torch.cat(group).view(torch.uint8).cpu().numpy().tobytes() for group in groups.values())

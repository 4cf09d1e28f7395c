"""A tiny video decoder for real time, and its stream.

The architecture is that of the TAEHV checkpoints (github.com/madebyollin/taehv, MIT; `taew2_1` is the one for the
latents of Wan 2.1), described by their parameter names and shapes: per stage three blocks that see the frame before,
spatial upsampling, a 1x1 convolution that makes several frames of one, and a 3x3 convolution.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from memflow.decoders.wan import CausalDecoder
from memflow.errors import MemFlowError

_BLOCKS = 3  # per stage


class MemoryBlock(nn.Module):
    """Three 3x3 convolutions over a frame and the one before it, with a skip connection."""

    def __init__(self, channels: int):
        super().__init__()
        convolutions = (nn.Conv2d(width * channels, channels, 3, padding=1) for width in (2, 1, 1))
        first, second, third = convolutions
        self.conv = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)

    def forward(self, frames: Tensor, before: Tensor) -> Tensor:
        """frames [B, T, C, h, w], before: the frame ahead of each of them."""
        out = self.conv(torch.cat([frames, before], dim=2).flatten(0, 1)).unflatten(0, frames.shape[:2])
        return F.relu(out + frames)


class Grow(nn.Module):
    """A 1x1 convolution that makes `factor` frames of one."""

    def __init__(self, channels: int, factor: int):
        super().__init__()
        self.factor = factor
        self.conv = nn.Conv2d(channels, channels * factor, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[n, C, h, w] -> [n * factor, C, h, w]."""
        return self.conv(x).unflatten(1, (self.factor, -1)).flatten(0, 1)


class TinyVideoDecoder(ModelMixin, ConfigMixin):
    """Latents to video with a few small convolutions, causal in time.

    Args:
        latent_channels: Channels of the latents.
        channels: Channels of the stages and of the last convolution.
        grow: Frames that each stage makes of one.
        patch_size: Pixels per side that the last convolution gives as channels.
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 16,
        channels: tuple = (256, 128, 64, 64),
        grow: tuple = (1, 2, 2),
        patch_size: int = 1,
    ):
        super().__init__()
        if len(channels) != len(grow) + 1:
            raise ValueError(f"channels must be one more than grow, got {tuple(channels)} and {tuple(grow)}")
        # Numbers of the layers are those of the checkpoints; layers without parameters have theirs too.
        layers: list[nn.Module] = [nn.Identity(), nn.Conv2d(latent_channels, channels[0], 3, padding=1), nn.ReLU()]
        for width, following, factor in zip(channels, channels[1:], grow, strict=False):
            layers += [MemoryBlock(width) for _ in range(_BLOCKS)]
            layers += [nn.Upsample(scale_factor=2), Grow(width, factor)]
            layers += [nn.Conv2d(width, following, 3, padding=1, bias=False)]
        layers += [nn.ReLU(), nn.Conv2d(channels[-1], 3 * patch_size**2, 3, padding=1)]
        self.decoder = nn.ModuleList(layers)

    @property
    def temporal_factor(self) -> int:
        """Frames that a latent frame becomes."""
        return math.prod(self.config.grow)

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent pixel, along height and width."""
        return 2 ** len(self.config.grow) * self.config.patch_size

    def forward(self, latents: Tensor, past: list[Tensor | None] | None = None) -> tuple[Tensor, list[Tensor | None]]:
        """Decodes the next frames of a video.

        Args:
            latents: [B, C, F, h, w].
            past: Per layer the last frame that it has seen, None where that is nothing: as this has returned it.

        Returns:
            Video [B, 3, F * temporal_factor, H, W] in [-1, 1], and the past of what follows.
        """
        if latents.ndim != 5 or latents.shape[1] != self.config.latent_channels:
            raise ValueError(f"latents must be [B, {self.config.latent_channels}, F, h, w], got {list(latents.shape)}")
        past = list(past) if past else [None] * len(self.decoder)
        batch = latents.shape[0]
        x = torch.tanh(latents.transpose(1, 2).flatten(0, 1) / 3) * 3
        for index, layer in enumerate(self.decoder):
            if not isinstance(layer, MemoryBlock):
                x = layer(x)
                continue
            frames = x.unflatten(0, (batch, -1))
            first = torch.zeros_like(frames[:, :1]) if past[index] is None else past[index]
            x = layer(frames, torch.cat([first, frames[:, :-1]], dim=1)).flatten(0, 1)
            past[index] = frames[:, -1:].clone()
        video = F.pixel_shuffle(x, self.config.patch_size).clamp(0, 1) * 2 - 1
        return video.unflatten(0, (batch, -1)).transpose(1, 2), past

    @classmethod
    def from_original(cls, path, dtype: torch.dtype | None = None) -> TinyVideoDecoder:
        """The decoder in a TAEHV checkpoint; its encoder is left out. Sizes are read from the shapes.

        Args:
            path: .pth (read with weights_only=True) or .safetensors.
            dtype: Of the weights; None keeps that of the file.

        Raises:
            MemFlowError: The file is of another layout; the parameters are named.
        """
        tensors = _read(Path(path))
        try:
            sizes = _sizes(tensors)
        except (KeyError, IndexError, ZeroDivisionError) as error:
            raise MemFlowError(f"{path}: not a TAEHV decoder, it has no usable {error.args[0]}") from None
        with torch.device("meta"):
            model = cls(**sizes)
        expected = {name: tuple(x.shape) for name, x in model.state_dict().items()}
        found = {name: tuple(x.shape) for name, x in tensors.items()}
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        if wrong:
            few = "; ".join(f"{name}: {found.get(name)} where {expected.get(name)} is needed" for name in wrong[:5])
            raise MemFlowError(f"{path}: {len(wrong)} parameters do not fit a TAEHV decoder: {few}")
        model.load_state_dict({name: x.to(dtype or x.dtype) for name, x in tensors.items()}, assign=True)
        return model.eval().requires_grad_(False)


class TinyStreamDecoder(CausalDecoder):
    """Decodes a stream with a TinyVideoDecoder; what its blocks remember of the last frame is kept here.

    As the checkpoints are meant to be used, the frames that the first latent frame makes too many are dropped: a causal
    VAE makes a single one of it.

    Args:
        model: The model that decodes; it takes latents in the transformer's (normalised) units.
    """

    def __init__(self, model: TinyVideoDecoder):
        self.model = model
        self.temporal_factor, self.spatial_factor = model.temporal_factor, model.spatial_factor
        self.past: list[Tensor | None] = [None] * len(model.decoder)

    def _parts(self, latents: Tensor) -> Iterator[Tensor]:
        video, self.past = self.model(latents.to(self.model.device, self.model.dtype), self.past)
        first, self.frames = self.frames == 0, self.frames + latents.shape[2]
        yield video[:, :, self.temporal_factor - 1 :] if first else video

    def state_dict(self) -> dict[str, Tensor]:
        state = {f"past.{i}": frame for i, frame in enumerate(self.past) if frame is not None}
        return state | {"frames": torch.tensor(self.frames)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        blocks = [i for i, layer in enumerate(self.model.decoder) if isinstance(layer, MemoryBlock)]
        needed = {"frames", *(f"past.{i}" for i in blocks if int(state.get("frames", 0)))}
        if set(state) != needed:
            raise ValueError(f"state does not fit a TinyVideoDecoder: {sorted(set(state) ^ needed)}")
        self.frames = int(state["frames"])
        self.past = [None] * len(self.model.decoder)
        for index in blocks if self.frames else ():
            self.past[index] = state[f"past.{index}"].to(self.model.device, self.model.dtype)


def _sizes(tensors: dict[str, Tensor]) -> dict:
    """Arguments of TinyVideoDecoder, from the shapes of a checkpoint."""
    channels, grow = [tensors["decoder.1.weight"].shape[0]], []
    stage = _BLOCKS + 3  # layers
    last = max(int(name.split(".")[1]) for name in tensors)
    for first in range(3, last - 1, stage):
        weight = tensors[f"decoder.{first + _BLOCKS + 1}.conv.weight"]
        grow.append(weight.shape[0] // weight.shape[1])
        channels.append(tensors[f"decoder.{first + stage - 1}.weight"].shape[0])
    patch_size = round((tensors[f"decoder.{last}.weight"].shape[0] / 3) ** 0.5)
    return {
        "latent_channels": tensors["decoder.1.weight"].shape[1],
        "channels": tuple(channels),
        "grow": tuple(grow),
        "patch_size": patch_size,
    }


def _read(path: Path) -> dict[str, Tensor]:
    """The decoder's tensors, by name."""
    try:
        safe = path.suffix == ".safetensors"
        found = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
        return {name: x for name, x in found.items() if name.startswith("decoder.") and isinstance(x, Tensor)}
    except Exception as error:  # a pickle that is none, or damaged, fails in any way
        raise MemFlowError(f"{path}: cannot be read as a checkpoint: {error}") from None

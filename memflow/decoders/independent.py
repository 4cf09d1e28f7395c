"""Codecs that decode every latent frame on its own, and the one that the storybook's model was trained with."""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, ModelMixin  # diffusers loads a component by the base classes in its module
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from memflow.modes import own_modes


class IndependentCodec(ModelMixin, ConfigMixin):
    """A codec whose latent frames are decoded without each other, so that a stream needs no state to decode them.

    A subclass has `temporal_factor` and `spatial_factor`, video frames and pixels (along one side) per latent frame and
    pixel, and `decode`: latents [B, C, F, h, w] -> uint8 video [B, F * temporal_factor, H, W, 3].
    """

    temporal_factor: int
    spatial_factor: int


class IndependentDecoder:
    """The `StreamDecoder` of an `IndependentCodec`: there is no state."""

    def __init__(self, codec: IndependentCodec):
        self.codec = codec
        self.temporal_factor, self.spatial_factor = codec.temporal_factor, codec.spatial_factor

    @own_modes()
    def decode(self, latents: Tensor) -> Tensor:
        return self.codec.decode(latents).cpu()

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if state:
            raise ValueError(f"{type(self.codec).__name__} has no decoder state, got {sorted(state)}")


class StorybookCodec(IndependentCodec):
    """Autoencoder of single pictures, one latent pixel for 16 x 16 picture pixels.

    Latents have zero mean and unit variance per channel over the frames of the storybook's world.

    Args:
        channels: Channels of the latents.
        width: Channels at the latents' size; half as many at twice, a quarter at four times that size, where
            sub-pixels make the picture. A multiple of 4.
        upscale: Every pixel of a decoded video becomes a square of so many, so that it stays crisp.
    """

    @register_to_config
    def __init__(self, channels: int = 16, width: int = 96, upscale: int = 4):
        super().__init__()
        if min(channels, width, upscale) < 1 or width % 4:
            raise ValueError(
                f"channels, width and upscale must be at least 1 and width a multiple of 4, "
                f"got {channels}, {width}, {upscale}"
            )
        half, quarter = width // 2, width // 4
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(8),
            nn.Conv2d(192, 64, 1),
            nn.SiLU(),
            nn.Conv2d(64, width, 2, stride=2),
            _Residual(width),
            nn.Conv2d(width, channels, 1),
        )
        self.norm = nn.BatchNorm2d(channels, affine=False, momentum=0.02)
        self.decoder = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            _Residual(width),
            nn.Conv2d(width, 4 * half, 1),
            nn.PixelShuffle(2),
            _Residual(half),
            nn.Conv2d(half, 4 * quarter, 1),
            nn.PixelShuffle(2),
            _Residual(quarter),
            nn.Conv2d(quarter, 48, 3, padding=1),
            nn.PixelShuffle(4),
        )

    @property
    def temporal_factor(self) -> int:
        """Video frames per latent frame."""
        return 1

    @property
    def spatial_factor(self) -> int:
        """Video pixels per latent pixel, along height and width."""
        return 16 * self.config.upscale

    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures [n, H, W, 3] from 0 to 1 -> latents [n, channels, H / 16, W / 16]."""
        # Channels last: twice as fast on a CPU.
        pictures = pictures.permute(0, 3, 1, 2).to(self.dtype, memory_format=torch.channels_last)
        return self.norm(self.encoder(pictures - 0.5))

    def decode_frames(self, latents: Tensor) -> Tensor:
        """Latents [n, channels, h, w] -> pictures [n, 16 h, 16 w, 3], around 0 to 1, not upscaled."""
        return self.decoder(latents.to(self.dtype, memory_format=torch.channels_last)).permute(0, 2, 3, 1) + 0.5

    @own_modes()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, channels, F, h, w] -> uint8 video [B, F, 16 h upscale, 16 w upscale, 3]."""
        if latents.ndim != 5 or latents.shape[1] != self.config.channels:
            raise ValueError(f"latents must be [B, {self.config.channels}, F, h, w], got {list(latents.shape)}")
        frames = self.decode_frames(latents.transpose(1, 2).flatten(0, 1).to(self.device)).float()
        frames = frames.mul(255).round().clamp(0, 255).to(torch.uint8).unflatten(0, (latents.shape[0], -1))
        return _upscaled(frames, self.config.upscale)


class _Residual(nn.Module):
    """Two 3 x 3 convolutions around which the input passes."""

    def __init__(self, channels: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(nn.functional.silu(x))


def _upscaled(frames: Tensor, scale: int) -> Tensor:
    """[B, F, H, W, 3] -> [B, F, H * scale, W * scale, 3], every pixel a square. Whole rows are copied, which takes a
    quarter of the time of `repeat_interleave`."""
    batch, count, rows, columns, _ = frames.shape
    wide = frames.unsqueeze(4).expand(-1, -1, -1, -1, scale, -1).reshape(batch, count, rows, 1, columns * scale, 3)
    return wide.expand(-1, -1, -1, scale, -1, -1).reshape(batch, count, rows * scale, columns * scale, 3)

"""Between latents and video frames: the codec of the embedded model, and decoders that work chunk by chunk."""

import math
from functools import lru_cache

import torch
from diffusers import AutoencoderKLWan, ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from torch import Tensor

from memflow.decoders.taehv import TinyStreamDecoder, TinyVideoDecoder

_PEAK = 0.4  # pixel contrast (before the squash) of the lowest band of latents of unit variance


def _frequencies(temporal: int, spatial: int) -> list[tuple[int, int, int]]:
    """The cosine bands (time, row, column) of one block, slowest first."""
    bands = [(t, p, q) for t in range(temporal) for p in range(spatial) for q in range(spatial)]
    return sorted(bands, key=lambda band: (sum(k * k for k in band), band))


@lru_cache(maxsize=8)
def _basis(temporal: int, spatial: int, device: torch.device) -> Tensor:
    """Orthonormal cosines [bands, temporal, spatial, spatial], float32."""

    def cosines(size: int) -> Tensor:  # [frequency, position]
        frequency = torch.arange(size, dtype=torch.float64)[:, None]
        position = torch.arange(size, dtype=torch.float64)[None] + 0.5
        rows = torch.cos(math.pi / size * frequency * position) * math.sqrt(2 / size)
        rows[0] /= math.sqrt(2)
        return rows

    time, space = cosines(temporal), cosines(spatial)
    blocks = [torch.einsum("t,p,q->tpq", time[t], space[p], space[q]) for t, p, q in _frequencies(temporal, spatial)]
    return torch.stack(blocks).float().to(device)


class IndependentCodec(ModelMixin, ConfigMixin):
    """A codec whose latent frames are decoded without each other, so that a stream needs no state to decode them.

    A subclass has `temporal_factor` and `spatial_factor`, video frames and pixels (along one side) per latent frame and
    pixel, and `decode`: latents [B, C, F, h, w] -> uint8 video [B, F * temporal_factor, H, W, 3].
    """

    temporal_factor: int
    spatial_factor: int


class PixelShuffleCodec(IndependentCodec):
    """Latents to video by shuffling channels into pixels; nothing is learnt. Stands in for a VAE.

    A latent pixel is a block of `temporal` x `spatial` x `spatial` RGB pixels, so that there are
    3 * temporal * spatial**2 channels. They are cosine bands, slowest first, three colours each, weighted by
    `band_scale` as natural video is (amplitude falling with frequency): latents of unit variance, noise included,
    decode to soft pictures. A tanh takes the real line to the range of a pixel; `encode` inverts all of it.
    """

    @register_to_config
    def __init__(self, temporal: int = 4, spatial: int = 4):
        super().__init__()
        if temporal < 1 or spatial < 1:
            raise ValueError(f"temporal and spatial must be at least 1, got {temporal} and {spatial}")
        energy = torch.tensor([sum(k * k for k in band) for band in _frequencies(temporal, spatial)])
        scale = _PEAK * math.sqrt(len(energy)) * (1 + energy.double()) ** -1.5
        # A buffer that is saved, because diffusers can neither place nor load a model without any tensor.
        self.register_buffer("band_scale", scale.float())

    @property
    def temporal_factor(self) -> int:
        return self.config.temporal

    @property
    def spatial_factor(self) -> int:
        return self.config.spatial

    @property
    def channels(self) -> int:
        return 3 * self.config.temporal * self.config.spatial**2

    def _basis_and_scale(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """float32 on the device of the data, so that a codec that was offloaded serves too."""
        scale = self.band_scale.to(device, torch.float32)[:, None, None, None]
        return _basis(self.config.temporal, self.config.spatial, device), scale

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, F, h, w] of any float dtype -> uint8 video [B, F * temporal, h * spatial, w * spatial, 3]."""
        if latents.ndim != 5 or latents.shape[1] != self.channels:
            raise ValueError(f"latents must be [B, {self.channels}, F, h, w], got {list(latents.shape)}")
        batch, _, frames, rows, columns = latents.shape
        bands = latents.float().reshape(batch, -1, 3, frames, rows, columns)
        basis, scale = self._basis_and_scale(latents.device)
        video = torch.einsum("bncfhw,ntpq->bfthpwqc", bands, basis * scale)
        time, space = self.config.temporal, self.config.spatial
        video = video.reshape(batch, frames * time, rows * space, columns * space, 3)
        return video.tanh().add(1).mul(128).clamp(0, 255).to(torch.uint8)

    def encode(self, video: Tensor) -> Tensor:
        """uint8 video [B, T, H, W, 3], sizes multiples of the block, -> float32 latents [B, C, F, h, w]."""
        time, space = self.config.temporal, self.config.spatial
        if video.ndim != 5 or video.shape[-1] != 3 or video.dtype != torch.uint8:
            raise ValueError(f"video must be uint8 [B, T, H, W, 3], got {video.dtype} {list(video.shape)}")
        batch, frames, height, width, _ = video.shape
        if frames % time or height % space or width % space:
            raise ValueError(
                f"video of {frames} frames of {height}x{width} does not divide into blocks of {time}x{space}x{space}"
            )
        centred = (video.float() + 0.5) / 128 - 1  # the middle of each of the 256 steps, never quite -1 or 1
        blocks = centred.atanh().reshape(batch, frames // time, time, height // space, space, width // space, space, 3)
        basis, scale = self._basis_and_scale(video.device)
        return torch.einsum("bfthpwqc,ntpq->bncfhw", blocks, basis / scale).flatten(1, 2)


class IndependentDecoder:
    """Decodes a stream with an IndependentCodec: there is no state."""

    def __init__(self, codec: IndependentCodec):
        self.codec = codec

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, F, h, w] -> uint8 [B, T, H, W, 3] on the CPU."""
        return self.codec.decode(latents).cpu()

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if state:
            raise ValueError(f"{type(self.codec).__name__} has no decoder state, got {sorted(state)}")


class WanDecoder:
    """Decodes a stream with diffusers' AutoencoderKLWan, one latent frame at a time, whatever the chunks.

    The decoder's convolutions are causal in time; what each has to remember of the past is the model's feature cache,
    which is kept here from chunk to chunk. So the video equals that of `vae.decode` on the whole clip, and memory does
    not grow with its length. Latents are in the transformer's (normalised) units.
    """

    def __init__(self, vae: AutoencoderKLWan):
        if vae.use_tiling:
            raise ValueError("vae has tiling enabled, which a stream cannot use: call vae.disable_tiling()")
        self.vae = vae
        self.frames = 0
        # Per causal convolution: None (not reached yet), "Rep" (a temporal upsampler after one frame) or a tensor.
        self.cache: list[Tensor | str | None] = self._empty_cache()
        self._mean, self._std = (
            torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
        )

    def _empty_cache(self) -> list[Tensor | str | None]:
        return [None] * self.vae._cached_conv_counts["decoder"]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, F, h, w] -> uint8 [B, T, H, W, 3] on the CPU, where T = 4 F, less 3 in the first chunk."""
        frames = [_to_uint8(self._frame(frame)) for frame in latents.split(1, dim=2)]
        return torch.cat(frames, dim=1)

    @torch.no_grad()
    def decode_float(self, latents: Tensor) -> Tensor:
        """As `decode`, but the values in [-1, 1] of the VAE's dtype and on its device, [B, 3, T, H, W]."""
        return torch.cat([self._frame(frame) for frame in latents.split(1, dim=2)], dim=2)

    def _frame(self, latents: Tensor) -> Tensor:
        """Latents [B, C, 1, h, w] -> [B, 3, t, H, W] in [-1, 1]."""
        vae = self.vae
        if hasattr(
            getattr(vae, "_hf_hook", None), "pre_forward"
        ):  # offloading moves the model to its device here, as for vae.decode
            vae._hf_hook.pre_forward(vae)
        latents = latents.to(vae.device, vae.dtype)
        latents = latents * self._std.to(latents) + self._mean.to(latents)
        first = self.frames == 0
        features = vae.post_quant_conv(latents)
        video = vae.decoder(features, feat_cache=self.cache, feat_idx=[0], first_chunk=first)
        self.frames += 1
        if vae.config.patch_size is not None:
            video = unpatchify(video, patch_size=vae.config.patch_size)
        return video.clamp(-1.0, 1.0)

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors that a new decoder of the same VAE continues from: `frames`, `repeat` and `cache.<convolution>`."""
        state = {f"cache.{i}": entry.contiguous() for i, entry in enumerate(self.cache) if isinstance(entry, Tensor)}
        state["repeat"] = torch.tensor([i for i, entry in enumerate(self.cache) if isinstance(entry, str)]).long()
        state["frames"] = torch.tensor(self.frames)
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue where `state_dict` was taken. Raises ValueError for the state of another kind of decoder."""
        cache = self._empty_cache()
        try:
            for i in state["repeat"].tolist():
                cache[i] = "Rep"
            for name, entry in state.items():
                if name.startswith("cache."):
                    cache[int(name.removeprefix("cache."))] = entry
            frames = int(state["frames"])
        except (KeyError, IndexError) as error:
            raise ValueError(f"state does not fit an AutoencoderKLWan of {len(cache)} convolutions: {error}") from error
        self.frames, self.cache = frames, cache


StreamDecoder = IndependentDecoder | WanDecoder | TinyStreamDecoder
Vae = IndependentCodec | AutoencoderKLWan | TinyVideoDecoder


def stream_decoder(vae: Vae) -> StreamDecoder:
    """A decoder at the start of a video, one per stream."""
    if isinstance(vae, TinyVideoDecoder):
        return TinyStreamDecoder(vae)
    return (IndependentDecoder if _is_independent(vae) else WanDecoder)(vae)


def temporal_factor(vae: Vae) -> int:
    """Video frames per latent frame (after the first, which is a single video frame but with an IndependentCodec)."""
    if isinstance(vae, TinyVideoDecoder) or _is_independent(vae):
        return vae.temporal_factor
    return 2 ** sum(vae.config.temperal_downsample)


def spatial_factor(vae: Vae) -> int:
    """Pixels per latent pixel, along height and width."""
    if isinstance(vae, TinyVideoDecoder) or _is_independent(vae):
        return vae.spatial_factor
    return 2 ** (len(vae.config.dim_mult) - 1) * (vae.config.patch_size or 1)


def video_frames(vae: Vae, latent_frames: int, first: bool) -> int:
    """Video frames that `latent_frames` latent frames decode to; `first`: they are the first of the stream."""
    frames = latent_frames * temporal_factor(vae)
    if first and latent_frames and not isinstance(vae, IndependentCodec):
        frames -= temporal_factor(vae) - 1
    return frames


def _is_independent(vae: object) -> bool:
    if not isinstance(vae, IndependentCodec | AutoencoderKLWan):
        kinds = "an IndependentCodec, an AutoencoderKLWan or a TinyVideoDecoder"
        raise TypeError(f"vae must be {kinds}, got {type(vae).__name__}")
    return isinstance(vae, IndependentCodec)


def _to_uint8(video: Tensor) -> Tensor:
    """[B, 3, T, H, W] in [-1, 1] -> uint8 [B, T, H, W, 3] on the CPU."""
    return video.float().add(1).mul(127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1).cpu()

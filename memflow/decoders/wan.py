"""Wan's VAE, one latent frame at a time: its causal convolutions keep what they need of the past."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from torch import Tensor

from memflow.modes import own_modes


class CausalDecoder:
    """What decoders for the latents of a causal VAE share: of the first latent frame they make a single video frame.

    A subclass sets `temporal_factor` and `spatial_factor`, counts latent frames in `frames` and has `_parts`.
    """

    temporal_factor: int
    spatial_factor: int
    frames = 0

    def _parts(self, latents: Tensor) -> Iterator[Tensor]:
        """Video in [-1, 1], [B, 3, t, H, W], piece by piece."""
        raise NotImplementedError

    @own_modes()
    def decode(self, latents: Tensor) -> Tensor:
        """As `StreamDecoder`; latents in the transformer's (normalised) units, of any float dtype."""
        return torch.cat([_to_uint8(part) for part in self._parts(latents)], dim=1)


class WanDecoder(CausalDecoder):
    """Decodes a stream with diffusers' AutoencoderKLWan, one latent frame at a time, whatever the chunks.

    The decoder's convolutions are causal in time; what each has to remember of the past is the model's feature cache,
    which is kept here from chunk to chunk. So the video equals that of `vae.decode` on the whole clip, and memory does
    not grow with its length.

    Args:
        vae: The VAE of Wan 2.1 or 2.2, without tiling.
    """

    def __init__(self, vae: AutoencoderKLWan):
        if vae.use_tiling:
            raise ValueError("vae has tiling enabled, which a stream cannot use: call vae.disable_tiling()")
        self.vae = vae
        self.temporal_factor = 2 ** sum(vae.config.temperal_downsample)
        self.spatial_factor = 2 ** (len(vae.config.dim_mult) - 1) * (vae.config.patch_size or 1)
        # Per causal convolution: None (not reached yet), "Rep" (a temporal upsampler after one frame) or a tensor.
        self.cache: list[Tensor | str | None] = self._empty_cache()
        self._mean, self._std = (
            torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
        )

    def _empty_cache(self) -> list[Tensor | str | None]:
        return [None] * self.vae._cached_conv_counts["decoder"]

    def _parts(self, latents: Tensor) -> Iterator[Tensor]:
        for frame in latents.split(1, dim=2):
            yield self._frame(frame)

    def _frame(self, latents: Tensor) -> Tensor:
        """Latents [B, C, 1, h, w] -> [B, 3, t, H, W] in [-1, 1]."""
        vae = self.vae
        if hasattr(getattr(vae, "_hf_hook", None), "pre_forward"):
            vae._hf_hook.pre_forward(vae)  # offloading moves the model to its device here, as for vae.decode
        latents = latents.to(vae.device, vae.dtype)
        latents = latents * self._std.to(latents) + self._mean.to(latents)
        features = vae.post_quant_conv(latents)
        video = vae.decoder(features, feat_cache=self.cache, feat_idx=[0], first_chunk=self.frames == 0)
        self.frames += 1
        if vae.config.patch_size is not None:
            video = unpatchify(video, patch_size=vae.config.patch_size)
        return video.clamp(-1.0, 1.0)

    def state_dict(self) -> dict[str, Tensor]:
        """`frames`, `repeat` and `cache.<convolution>`."""
        state = {f"cache.{i}": entry.contiguous() for i, entry in enumerate(self.cache) if isinstance(entry, Tensor)}
        state["repeat"] = torch.tensor([i for i, entry in enumerate(self.cache) if isinstance(entry, str)]).long()
        state["frames"] = torch.tensor(self.frames)
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
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


def _to_uint8(video: Tensor) -> Tensor:
    """[B, 3, T, H, W] in [-1, 1] -> uint8 [B, T, H, W, 3] on the CPU."""
    return video.float().add(1).mul(127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1).cpu()

"""Latents to video, chunk by chunk: what a stream asks of a decoder, and the decoder for each kind of VAE."""

from __future__ import annotations

from typing import Protocol

from diffusers import AutoencoderKLWan
from torch import Tensor

from memflow.decoders.independent import IndependentCodec, IndependentDecoder
from memflow.decoders.taehv import TinyStreamDecoder, TinyVideoDecoder
from memflow.decoders.wan import WanDecoder
from memflow.errors import MemFlowError

_DECODERS = {IndependentCodec: IndependentDecoder, AutoencoderKLWan: WanDecoder, TinyVideoDecoder: TinyStreamDecoder}
# Where the classes are that folders of earlier versions name by other modules of this package.
_HOMES = {"StorybookCodec": "memflow.decoders.independent", "TinyVideoDecoder": "memflow.decoders.taehv"}


class StreamDecoder(Protocol):
    """Decodes the latents of one stream, or of a batch of streams in step.

    Attributes:
        temporal_factor: Video frames per latent frame; of the first one a causal VAE makes a single frame.
        spatial_factor: Pixels per latent pixel, along height and width.
    """

    temporal_factor: int
    spatial_factor: int

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, F, h, w] of the next F frames -> uint8 video [B, T, H, W, 3] on the CPU."""

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors that a new decoder of the same VAE continues from."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue where `state_dict` was taken. Raises ValueError for the state of another kind of decoder."""


def stream_decoder(vae: IndependentCodec | AutoencoderKLWan | TinyVideoDecoder) -> StreamDecoder:
    """A decoder at the start of a video, one per stream.

    Args:
        vae: The model that decodes.

    Raises:
        TypeError: `vae` is of another class.
        ValueError: `vae` is set to work in a way that a stream cannot use.
    """
    for kind, decoder in _DECODERS.items():
        if isinstance(vae, kind):
            return decoder(vae)
    kinds = ", ".join(kind.__name__ for kind in _DECODERS)
    raise TypeError(f"vae must be one of {kinds}, got {type(vae).__name__}")


def current_class(module: str | None, name: str | None) -> list[str | None]:
    """The class of a VAE as model_index.json has it, module and name, with the module that the class is in now."""
    if name == "PixelShuffleCodec" and str(module).startswith("memflow."):
        raise MemFlowError(f"{name}, of the preset 'noise', has left memflow; memflow_bench.untrained has both")
    return [_HOMES.get(name, module) if str(module).startswith("memflow.") else module, name]


def use_decoder(pipeline, path) -> None:
    """Let a pipeline decode with a TAEHV checkpoint in place of its VAE.

    Args:
        pipeline: A `MemFlowPipeline`.
        path: The checkpoint, .pth or .safetensors.

    Raises:
        MemFlowError: The file is no such checkpoint, or not one for the latents of this pipeline.
    """
    model = TinyVideoDecoder.from_original(path, dtype=pipeline.transformer.dtype)
    channels = pipeline.transformer.config.in_channels
    if model.config.latent_channels != channels:
        raise MemFlowError(
            f"{path}: decodes latents of {model.config.latent_channels} channels, this model makes {channels}"
        )
    here, there = stream_decoder(pipeline.vae), stream_decoder(model)
    if (there.temporal_factor, there.spatial_factor) != (here.temporal_factor, here.spatial_factor):
        raise MemFlowError(
            f"{path}: makes {there.temporal_factor} frames and {there.spatial_factor} pixels of a latent one, the "
            f"model's VAE {here.temporal_factor} and {here.spatial_factor}"
        )
    pipeline.register_modules(vae=model.to(pipeline._execution_device))

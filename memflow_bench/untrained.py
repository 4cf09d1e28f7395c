"""A pipeline of tiny components with random weights, for tests and measurements of the machinery.

Architecture and code path are those of the real models. The weights are random, from a fixed seed, and so arranged that
something can be watched: a cloth of colours that the prompt decides and that remembers what it looked like.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ModelMixin, WanTransformer3DModel  # noqa: F401 (see decoders)
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel

from memflow import MemFlowPipeline
from memflow.decoders.independent import IndependentCodec
from memflow.models.wan.checkpoints import kept_dtype

DEFAULT_SIZE = (64, 64)  # video height and width, in pixels
MAX_LENGTH = 128  # of a prompt, in bytes
_TEXT_DIM = 64
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


def noise_pipeline(*, dtype: torch.dtype = torch.float32) -> MemFlowPipeline:
    """The pipeline on the CPU, always the same one.

    Args:
        dtype: Of the weights; what the models want in float32 stays so, as with `from_pretrained`.
    """
    components, (height, width) = build(), DEFAULT_SIZE
    cast(components["transformer"], dtype)
    cast(components["text_encoder"], dtype)
    pipeline = MemFlowPipeline(**components, text_length=MAX_LENGTH, height=height, width=width)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """As `from_pretrained(dtype=...)` does: what the model wants in float32 stays so."""
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(kept_dtype(model, name, dtype))


def build(seed: int = 7) -> dict[str, object]:
    """The components of a pipeline by name, in float32 on the CPU, in eval mode.

    Equal for equal seeds; torch's global random state is left as it was. Of the first ten seeds 7 tells prompts apart
    best by their colours.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = PixelShuffleCodec()
        return {
            "transformer": _transformer(vae),
            "text_encoder": _text_encoder(),
            "tokenizer": ByT5Tokenizer(),
            "vae": vae.eval(),
            "scheduler": FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=5.0),
        }


def _text_encoder() -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=384,  # ByT5: 256 bytes, 3 specials, 125 sentinels
        d_model=_TEXT_DIM,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        tie_word_embeddings=False,
    )
    return UMT5EncoderModel(config).eval()


def _transformer(vae: PixelShuffleCodec) -> WanTransformer3DModel:
    model = WanTransformer3DModel(
        num_attention_heads=3,
        attention_head_dim=32,
        in_channels=vae.channels,
        out_channels=vae.channels,
        text_dim=_TEXT_DIM,
        ffn_dim=256,
        num_layers=4,
    )
    _make_watchable(model, vae.band_scale)
    return model.eval()


@torch.no_grad()
def _make_watchable(model: WanTransformer3DModel, band_scale: Tensor) -> None:
    """Without this the flow knows nothing of the noise that it should cancel, and every frame is grey snow."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.bias.zero_()  # or all prompts share most of what they show
    softness = _carry_slow_bands(model, band_scale)
    model.scale_shift_table.zero_()
    model.condition_embedder.time_embedder.linear_2.weight.mul_(0.3)
    model.condition_embedder.time_proj.weight.mul_(0.3)
    size = model.config.attention_head_dim
    axis = 2 * (size // 6)  # rotary channels of rows, and of columns, at the end of a head
    slowest_pairs = [size - 2 * axis, size - 2 * axis + 2, size - axis, size - axis + 2]
    for block in model.blocks:
        # What a layer adds goes to the slow bands: the text most of all, then the past, then the nonlinear rest.
        for layer, strength in ((block.attn2.to_out[0], 4.0), (block.attn1.to_out[0], 1.5), (block.ffn.net[2], 0.3)):
            layer.weight.mul_(strength * softness[:, None])
        block.scale_shift_table[:, (2, 5)] += 0.4  # the gates, so that no layer works against its own output
        # Queries of the prompt that hardly see the noise, and sharp: each head and layer picks a few bytes.
        block.attn2.to_q.weight.mul_(0.2)
        nn.init.normal_(block.attn2.to_q.bias)
        block.attn2.norm_q.weight.mul_(8.0)
        # Self-attention looks at its own place in all frames: equal offsets under the rotation of row and column.
        for layer, norm in ((block.attn1.to_q, block.attn1.norm_q), (block.attn1.to_k, block.attn1.norm_k)):
            layer.bias.view(-1, size)[:, slowest_pairs] = 4.0
            norm.weight.mul_(1.5)


def _carry_slow_bands(model: WanTransformer3DModel, band_scale: Tensor) -> Tensor:
    """Lets the residual stream carry the slowest bands of a patch, whose noise the output projection can then cancel.

    Returns how slow each hidden channel is, [dim], with a root mean square of 1.
    """
    dim, channels = model.patch_embedding.weight.shape[:2]
    bands = dim // 4  # of each of the 2 x 2 latent pixels of a patch, mixed to sum and differences
    mix = torch.tensor([[1, 1, 1, 1], [1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]]) / 2
    carry = torch.zeros(4, bands, channels, 4)  # [mixture, band and colour, latent channel, pixel of the patch]
    for channel in range(bands):
        carry[:, channel, channel] = mix
    model.patch_embedding.weight.copy_(carry.reshape(model.patch_embedding.weight.shape))
    model.patch_embedding.bias.zero_()
    # x0 = x - sigma v, and the last sigma is 0.625: a flow of x / 0.625 leaves no noise in the picture.
    model.proj_out.weight.copy_(1.6 * carry.permute(3, 2, 0, 1).reshape(model.proj_out.weight.shape))
    slow = (band_scale / band_scale[0])[:, None].expand(-1, 3).flatten()[:bands]
    softness = torch.stack([slow, *[0.3 * slow] * 3]).flatten() ** 2
    return softness / softness.square().mean().sqrt()


class PixelShuffleCodec(IndependentCodec):
    """Latents to video by shuffling channels into pixels; nothing is learnt. Stands in for a VAE.

    A latent pixel is a block of `temporal` x `spatial` x `spatial` RGB pixels, so that there are
    3 * temporal * spatial**2 channels. They are cosine bands, slowest first, three colours each, weighted by
    `band_scale` as natural video is (amplitude falling with frequency): latents of unit variance, noise included,
    decode to soft pictures. A tanh takes the real line to the range of a pixel; `encode` inverts all of it.

    Args:
        temporal: Video frames per latent frame.
        spatial: Pixels per latent pixel, along height and width.
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

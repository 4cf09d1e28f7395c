"""Names and shapes of the original files, and the diffusers or transformers model that they make up.

For each of the three models of Wan 2.1: every tensor that its original file holds, the sizes that shapes tell, and
which name each tensor has in the library. The names of transformer and VAE are mapped by diffusers itself; those of
the UMT5 encoder are those of Wan-Video/Wan2.1 (wan/modules/t5.py) and of transformers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from memflow.errors import MemFlowError
from memflow.models.wan.originals import listed

_TRANSFORMER = ("patch_embedding", "text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2")
_TRANSFORMER += ("time_projection.1", "head.head")
_UMT5 = {"token_embedding.weight": "shared.weight", "norm.weight": "encoder.final_layer_norm.weight"}
_UMT5_BLOCK = {
    "norm1": "layer.0.layer_norm",
    "attn.q": "layer.0.SelfAttention.q",
    "attn.k": "layer.0.SelfAttention.k",
    "attn.v": "layer.0.SelfAttention.v",
    "attn.o": "layer.0.SelfAttention.o",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}
_VAE_CHANNELS = 16  # of the latents; their published mean and deviation are in AutoencoderKLWan's defaults


class Layout(NamedTuple):
    """What original tensors make up.

    model: on the meta device. original: the model's names to the original ones, for the tensors that are there.
    notes: what does not fit, one line each; empty unless `partial` was asked for.
    """

    model: torch.nn.Module
    original: dict[str, str]
    notes: list[str]


def transformer_layout(
    tensors: Mapping[str, Tensor], *, source: str, num_attention_heads: int | None = None, partial: bool = False
) -> Layout:
    """A text-to-video transformer. Shapes do not tell the heads: None means 128 channels each, as published.

    Only names and shapes are looked at. Raises MemFlowError for missing, unexpected and misshapen tensors, by name;
    with `partial` they are left out, and named in the notes.
    """
    layers = _count(tensors)
    names = list(_transformer_names(layers))
    # The mapping of names is diffusers' own; run on the names themselves it tells which is which.
    mapping = convert_wan_transformer_to_diffusers({name: name for name in names})

    def build(shape):
        dim, in_channels, *patch = shape("patch_embedding.weight", 5)
        heads = num_attention_heads
        if heads is None:
            if dim % 128:
                raise MemFlowError(
                    f"{source}: {dim} channels are no multiple of the usual 128: pass num_attention_heads"
                )
            heads = dim // 128
        if heads < 1 or dim % heads:
            raise MemFlowError(f"{source}: num_attention_heads={heads} does not divide the {dim} channels")
        return WanTransformer3DModel(
            patch_size=tuple(patch),
            num_attention_heads=heads,
            attention_head_dim=dim // heads,
            in_channels=in_channels,
            out_channels=shape("head.head.weight", 2)[0] // math.prod(patch),
            text_dim=shape("text_embedding.0.weight", 2)[1],
            freq_dim=shape("time_embedding.0.weight", 2)[1],
            ffn_dim=shape("blocks.0.ffn.0.weight", 2)[0],
            num_layers=layers,
        )

    return _fit(tensors, mapping, build, source, partial)


def vae_layout(tensors: Mapping[str, Tensor], *, source: str, partial: bool = False) -> Layout:
    """The VAE of Wan 2.1 (16 latent channels), of any width. Errors as for the transformer."""
    mapping = convert_wan_vae_to_diffusers({name: name for name in _vae_names()})

    def build(shape):
        channels = shape("conv2.weight", 5)[0]
        if channels != _VAE_CHANNELS:
            raise MemFlowError(f"{source}: a VAE of {channels} latent channels; that of Wan 2.1 has {_VAE_CHANNELS}")
        return AutoencoderKLWan(base_dim=shape("encoder.conv1.weight", 5)[0])

    return _fit(tensors, mapping, build, source, partial)


def text_encoder_layout(tensors: Mapping[str, Tensor], *, source: str, partial: bool = False) -> Layout:
    """A UMT5 encoder. Errors as for the transformer."""
    layers = _count(tensors)
    mapping = {new: old for old, new in _UMT5.items()}
    for i in range(layers):
        mapping |= {f"encoder.block.{i}.{new}.weight": f"blocks.{i}.{old}.weight" for old, new in _UMT5_BLOCK.items()}

    def build(shape):
        vocabulary, dim = shape("token_embedding.weight", 2)
        buckets, heads = shape("blocks.0.pos_embedding.embedding.weight", 2)
        config = UMT5Config(
            vocab_size=vocabulary,
            d_model=dim,
            d_kv=shape("blocks.0.attn.q.weight", 2)[0] // heads,
            d_ff=shape("blocks.0.ffn.fc1.weight", 2)[0],
            num_layers=layers,
            num_heads=heads,
            relative_attention_num_buckets=buckets,
            architectures=["UMT5EncoderModel"],
        )
        return UMT5EncoderModel(config)

    return _fit(tensors, mapping, build, source, partial)


LAYOUTS: dict[str, Callable[..., Layout]] = {
    "transformer": transformer_layout,
    "text_encoder": text_encoder_layout,
    "vae": vae_layout,
}


def _fit(tensors, mapping: dict[str, str], build, source: str, partial: bool) -> Layout:
    """`mapping`: the library's names to the original ones. `build(shape)` makes the model from original shapes."""
    notes: list[str] = []

    def refuse(what: str, names: list[str]) -> None:
        if names and not partial:
            raise MemFlowError(f"{source}: {len(names)} {what} tensors: {listed(names)}")
        notes.extend(f"{what}: {name}" for name in names)

    def shape(name: str, ndim: int) -> torch.Size:
        if name not in tensors:
            raise MemFlowError(f"{source}: without {name} the size of the model is not known")
        if tensors[name].ndim != ndim:
            found = list(tensors[name].shape)
            raise MemFlowError(f"{source}: 1 misshapen tensors: {name} {found} (needs {ndim} dimensions)")
        return tensors[name].shape

    known = set(mapping.values())
    refuse("missing", sorted(known - tensors.keys()))
    refuse("unexpected", sorted(tensors.keys() - known))
    with init_empty_weights():
        model = build(shape)
    wanted = model.state_dict()
    there = {new: old for new, old in mapping.items() if old in tensors}
    misshapen = {new for new, old in there.items() if tensors[old].shape != wanted[new].shape}
    refuse(
        "misshapen",
        [
            f"{there[new]} {list(tensors[there[new]].shape)} (needs {list(wanted[new].shape)})"
            for new in wanted
            if new in misshapen
        ],
    )
    return Layout(model, {new: there[new] for new in wanted if new in there and new not in misshapen}, notes)


def _count(tensors: Iterable[str]) -> int:
    """Layers, by their highest number."""
    return 1 + max((int(m[1]) for name in tensors if (m := re.match(r"blocks\.(\d+)\.", name))), default=0)


def _transformer_names(layers: int) -> Iterable[str]:
    for module in _TRANSFORMER:
        yield from _both(module)
    yield "head.modulation"
    for i in range(layers):
        yield f"blocks.{i}.modulation"
        for module in ("norm3", "ffn.0", "ffn.2"):
            yield from _both(f"blocks.{i}.{module}")
        for attention in (f"blocks.{i}.self_attn", f"blocks.{i}.cross_attn"):
            for projection in "qkvo":
                yield from _both(f"{attention}.{projection}")
            yield from (f"{attention}.norm_q.weight", f"{attention}.norm_k.weight")


def _vae_names() -> Iterable[str]:
    """Four stages of two (encoder) and three (decoder) residual blocks with a resampler between stages."""
    yield from _both("conv1")
    yield from _both("conv2")
    for side, stages, blocks in (("encoder", "downsamples", 2), ("decoder", "upsamples", 3)):
        yield from _both(f"{side}.conv1")
        for i in (0, 2):
            yield from _residual(f"{side}.middle.{i}")
        yield f"{side}.middle.1.norm.gamma"
        yield from _both(f"{side}.middle.1.to_qkv")
        yield from _both(f"{side}.middle.1.proj")
        yield f"{side}.head.0.gamma"
        yield from _both(f"{side}.head.2")
        for i in range(4 * (blocks + 1) - 1):
            if i % (blocks + 1) < blocks:
                yield from _residual(f"{side}.{stages}.{i}")
            else:
                yield from _both(f"{side}.{stages}.{i}.resample.1")
    # Where channels grow, and where time is resampled too.
    for module in ("encoder.downsamples.3", "encoder.downsamples.6", "decoder.upsamples.4"):
        yield from _both(f"{module}.shortcut")
    for module in ("encoder.downsamples.5", "encoder.downsamples.8", "decoder.upsamples.3", "decoder.upsamples.7"):
        yield from _both(f"{module}.time_conv")


def _residual(block: str) -> Iterable[str]:
    for norm, convolution in ((0, 2), (3, 6)):
        yield f"{block}.residual.{norm}.gamma"
        yield from _both(f"{block}.residual.{convolution}")


def _both(module: str) -> Iterable[str]:
    return f"{module}.weight", f"{module}.bias"

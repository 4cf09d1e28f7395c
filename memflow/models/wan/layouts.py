"""The models of diffusers and transformers that original tensors make up: their names there, and their sizes.

diffusers maps the names of transformer and Wan 2.1's VAE; those of Wan 2.2's VAE and of the UMT5 encoder are from
Wan-Video (Wan2.2: wan/modules/vae2_2.py, Wan2.1: wan/modules/t5.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping

from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers
from transformers import UMT5Config, UMT5EncoderModel

from memflow.errors import MemFlowError
from memflow.models.wan import WAN_2_2_VAE

_UMT5 = {
    "token_embedding": "shared",
    "norm": "encoder.final_layer_norm",
    "blocks": "encoder.block",
    "norm1": "layer.0.layer_norm",
    "attn": "layer.0.SelfAttention",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}
_STAGE = re.compile(r"(encoder|decoder)\.(?:down|up)samples\.(\d+)\.(?:down|up)samples\.(\d+)\.(.+)")
_RESIDUAL = {
    "residual.0.": "norm1.",
    "residual.2.": "conv1.",
    "residual.3.": "norm2.",
    "residual.6.": "conv2.",
    "shortcut.": "conv_shortcut.",
}


def _transformer(shape: Callable, source: str, layers: int, heads: int | None) -> WanTransformer3DModel:
    dim, in_channels, *patch = shape("patch_embedding.weight", 5)
    if heads is None:
        if dim % 128:
            raise MemFlowError(f"{source}: {dim} channels are no multiple of the usual 128: pass num_attention_heads")
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


def _vae(shape: Callable, source: str, layers: int, heads: None) -> AutoencoderKLWan:
    channels, width = shape("conv2.weight", 5)[0], shape("encoder.conv1.weight", 5)[0]
    if channels == WAN_2_2_VAE["z_dim"]:
        widths = {"base_dim": width, "decoder_base_dim": shape("decoder.conv1.weight", 5)[0] // 4}
        return AutoencoderKLWan(**{**WAN_2_2_VAE, **widths})
    if channels != 16:  # whose mean and deviation are the library's defaults
        raise MemFlowError(f"{source}: a VAE of {channels} latent channels; that of Wan 2.1 has 16, that of Wan 2.2 48")
    return AutoencoderKLWan(base_dim=width)


def _vae_names(tensors: Mapping[str, str]) -> dict[str, str]:
    """`tensors` by their names in diffusers, whose own mapping is for Wan 2.1. Wan 2.2 has stages around the blocks."""
    stages = {name: match for name in tensors if (match := _STAGE.fullmatch(name))}
    renamed = convert_wan_vae_to_diffusers({name: tensors[name] for name in tensors if name not in stages})
    for name, match in stages.items():
        side, stage, block, rest = match.groups()
        way = "down" if side == "encoder" else "up"
        inner = f"resnets.{block}" if rest.startswith(tuple(_RESIDUAL)) else f"{way}sampler"
        for old, new in _RESIDUAL.items():
            rest = rest.replace(old, new)
        renamed[f"{side}.{way}_blocks.{stage}.{inner}.{rest}"] = tensors[name]
    return renamed


def _text_encoder(shape: Callable, source: str, layers: int, heads: None) -> UMT5EncoderModel:
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


def _umt5_names(tensors: Mapping[str, str]) -> dict[str, str]:
    """`tensors` by their names in transformers."""
    renamed = {}
    for name, content in tensors.items():
        new = f".{name}"
        for old_part, new_part in _UMT5.items():
            new = new.replace(f".{old_part}.", f".{new_part}.")
        renamed[new.removeprefix(".")] = content
    return renamed


# By kind: what renames names of the original to the library's, and what builds the model from the tensors' shapes.
KINDS: dict[str, tuple[Callable, Callable]] = {
    "transformer": (convert_wan_transformer_to_diffusers, _transformer),
    "vae": (_vae_names, _vae),
    "text_encoder": (_umt5_names, _text_encoder),
}

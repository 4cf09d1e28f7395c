"""Transformers from files in the layout of the original Wan code (also Self-Forcing's, LongLive's and MemFlow's)."""

import math
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import load_file
from torch import Tensor

from memflow.errors import MemFlowError

_WRAPPERS = ("generator_ema", "generator", "model")  # top-level keys of training checkpoints; averaged weights first
_OUTER = ("patch_embedding", "text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2")
_OUTER += ("time_projection.1", "head.head")
_SHOWN = 12  # names listed in a message


def load_transformer(
    path: str | Path, *, dtype: torch.dtype | None = None, num_attention_heads: int | None = None
) -> WanTransformer3DModel:
    """Loads a text-to-video transformer from one original-layout file.

    Args:
        path: .safetensors, or .pth / .pt (read with weights_only=True). The tensors may lie under a top-level key
            `generator_ema` (taken first), `generator` or `model`, their names may have the prefixes `model.` and
            `_fsdp_wrapped_module.`.
        dtype: None keeps the file's dtypes; otherwise as in diffusers' from_pretrained, where the modules that
            need it stay in float32.
        num_attention_heads: shapes do not tell it; None means heads of 128 channels, as in all published models.

    Returns the model on the CPU, in eval mode.
    Raises MemFlowError where the file cannot be read, or for missing, unexpected and misshapen tensors, by name.
    """
    path = Path(path)
    model, converted = convert_transformer(_read(path), num_attention_heads=num_attention_heads, source=path.name)
    if dtype is not None:
        for name, tensor in converted.items():
            keep = not set(model._keep_in_fp32_modules).isdisjoint(name.split("."))
            converted[name] = tensor.to(torch.float32 if keep else dtype)
    model.load_state_dict(converted, strict=True, assign=True)
    return model.requires_grad_(True).eval()


def convert_transformer(
    tensors: Mapping[str, Tensor], *, num_attention_heads: int | None = None, source: str = "checkpoint"
) -> tuple[WanTransformer3DModel, dict[str, Tensor]]:
    """The model (on the meta device) that tensors of the original names make up, and the tensors by diffusers' names.

    Only names and shapes are looked at, so the tensors may be on the meta device. Errors as in `load_transformer`.
    """
    tensors = _strip_prefixes(tensors, source)
    layers = 1 + max((int(m[1]) for name in tensors if (m := re.match(r"blocks\.(\d+)\.", name))), default=0)
    names = list(_original_names(layers))
    _refuse(source, "missing", sorted(set(names) - tensors.keys()))
    _refuse(source, "unexpected", sorted(tensors.keys() - set(names)))
    config = _infer_config(tensors, layers, num_attention_heads, source)
    with init_empty_weights():
        model = WanTransformer3DModel(**config)
    # The mapping of names is diffusers' own; run on the names themselves it tells which is which.
    original = convert_wan_transformer_to_diffusers({name: name for name in names})
    misshapen = [
        f"{original[name]} {list(tensors[original[name]].shape)} (needs {list(parameter.shape)})"
        for name, parameter in model.state_dict().items()
        if tensors[original[name]].shape != parameter.shape
    ]
    _refuse(source, "misshapen", misshapen)
    return model, {name: tensors[old] for name, old in original.items()}


def _original_names(layers: int) -> Iterable[str]:
    """Every tensor of a text-to-video model."""
    for module in _OUTER:
        yield from (f"{module}.weight", f"{module}.bias")
    yield "head.modulation"
    for i in range(layers):
        yield f"blocks.{i}.modulation"
        for module in ("norm3", "ffn.0", "ffn.2"):
            yield from (f"blocks.{i}.{module}.weight", f"blocks.{i}.{module}.bias")
        for attention in (f"blocks.{i}.self_attn", f"blocks.{i}.cross_attn"):
            for projection in "qkvo":
                yield from (f"{attention}.{projection}.weight", f"{attention}.{projection}.bias")
            yield from (f"{attention}.norm_q.weight", f"{attention}.norm_k.weight")


def _infer_config(tensors: Mapping[str, Tensor], layers: int, heads: int | None, source: str) -> dict[str, object]:
    def shape(name: str, ndim: int) -> torch.Size:
        if tensors[name].ndim != ndim:
            _refuse(source, "misshapen", [f"{name} {list(tensors[name].shape)} (needs {ndim} dimensions)"])
        return tensors[name].shape

    dim, in_channels, *patch = shape("patch_embedding.weight", 5)
    if heads is None:
        if dim % 128:
            raise MemFlowError(f"{source}: {dim} channels are no multiple of the usual 128: pass num_attention_heads")
        heads = dim // 128
    if heads < 1 or dim % heads:
        raise MemFlowError(f"{source}: num_attention_heads={heads} does not divide the {dim} channels")
    return {
        "patch_size": tuple(patch),
        "num_attention_heads": heads,
        "attention_head_dim": dim // heads,
        "in_channels": in_channels,
        "out_channels": shape("head.head.weight", 2)[0] // math.prod(patch),
        "text_dim": shape("text_embedding.0.weight", 2)[1],
        "freq_dim": shape("time_embedding.0.weight", 2)[1],
        "ffn_dim": shape("blocks.0.ffn.0.weight", 2)[0],
        "num_layers": layers,
    }


def _strip_prefixes(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    stripped = {}
    for name, tensor in tensors.items():
        short = name.replace("_fsdp_wrapped_module.", "").removeprefix("model.")
        if short in stripped:
            raise MemFlowError(f"{source}: {short} is there twice, once as {name}")
        stripped[short] = tensor
    return stripped


def _read(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a file, out of their wrapper."""
    if path.suffix not in (".safetensors", ".pth", ".pt"):
        raise MemFlowError(f"{path}: a checkpoint is a .safetensors, .pth or .pt file")
    if not path.is_file():
        raise MemFlowError(f"{path}: there is no such file")
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged pickle can raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise MemFlowError(f"{path}: not a readable checkpoint of tensors ({reason})") from error
    for key in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping):
        raise MemFlowError(f"{path}: holds no tensors by name but a {type(content).__name__}")
    others = [str(name) for name, entry in content.items() if not isinstance(entry, Tensor)]
    if others:
        raise MemFlowError(f"{path}: {', '.join(others[:_SHOWN])}: not tensors")
    return content


def _refuse(source: str, what: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        raise MemFlowError(f"{source}: {len(names)} {what} tensors: {', '.join(names[:_SHOWN])}{more}")

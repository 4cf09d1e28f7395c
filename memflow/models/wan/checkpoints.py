"""Transformers from files in the layout of the original Wan code (also Self-Forcing's, LongLive's and MemFlow's)."""

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor
from transformers import PreTrainedModel

from memflow.models.wan.layouts import transformer_layout
from memflow.models.wan.originals import read_tensors, strip_prefixes


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
    model, converted = convert_transformer(
        read_tensors(path), num_attention_heads=num_attention_heads, source=path.name
    )
    if dtype is not None:
        converted = {name: tensor.to(kept_dtype(model, name, dtype)) for name, tensor in converted.items()}
    model.load_state_dict(converted, strict=True, assign=True)
    return model.requires_grad_(True).eval()


def convert_transformer(
    tensors: Mapping[str, Tensor], *, num_attention_heads: int | None = None, source: str = "checkpoint"
) -> tuple[WanTransformer3DModel, dict[str, Tensor]]:
    """The model (on the meta device) that tensors of the original names make up, and the tensors by diffusers' names.

    Only names and shapes are looked at, so the tensors may be on the meta device. Errors as in `load_transformer`.
    """
    tensors = strip_prefixes(tensors, source)
    layout = transformer_layout(tensors, source=source, num_attention_heads=num_attention_heads)
    return layout.model, {new: tensors[old] for new, old in layout.original.items()}


def kept_dtype(model: torch.nn.Module, name: str, dtype: torch.dtype) -> torch.dtype:
    """What `from_pretrained(dtype=dtype)` makes of the parameter `name`.

    Some modules stay in float32: with diffusers in every dtype, with transformers only against the range of float16.
    """
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    if kept.isdisjoint(name.split(".")) or (isinstance(model, PreTrainedModel) and dtype != torch.float16):
        return dtype
    return torch.float32

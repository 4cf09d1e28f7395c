"""Checkpoints in the layouts of the original repositories, and the models of diffusers and transformers that they make.

A file is recognised by the names of its tensors.
"""

from __future__ import annotations

import json
import math
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from memflow.errors import MemFlowError, first_line
from memflow.models.wan.layouts import KINDS

SUFFIXES = (".safetensors", ".pth", ".pt")
# Top-level keys of training checkpoints: the averaged weights and those trained; a whole model, an adapter.
GENERATORS = ("generator_ema", "generator")
_OTHER_WRAPPERS = ("model", "state_dict", "generator_lora")
_PREFIXES = ("base_model.model.", "model.", "diffusion_model.")
_MODULE_WRAPPERS = re.compile(r"(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
_SIGNS = {
    "lora": r"\.lora_(A|B|down|up)\.",
    "transformer": r"blocks\.\d+\.(self_attn|cross_attn|norm3)\.|patch_embedding\.|head\.head\.",
    "text_encoder": r"blocks\.\d+\.(attn|pos_embedding)\.|token_embedding\.",
    "vae": r"(encoder|decoder)\.(middle|downsamples|upsamples)\.",
}
_LONGEST_NAME = 10_000  # characters of a tensor's name
_MOST_TENSORS = 50_000  # of a file; the published ones hold some thousand
_MOST_LAYERS = 1000
_SHOWN = 12  # names listed in a message


class Unreadable(MemFlowError):
    """A file that is damaged, or none of its kind."""


class Checkpoint(NamedTuple):
    """The tensors of one original file."""

    kind: str  # "transformer", "vae", "text_encoder" or "lora"
    path: Path
    # By their original names. They are mapped from the file, but for .pth files from before torch 1.6: not to be
    # written to.
    tensors: dict[str, Tensor]
    generators: tuple[str, ...] = ()  # which of `GENERATORS` the file holds, the one that `tensors` are of first


class Layout(NamedTuple):
    """What original tensors make up."""

    model: torch.nn.Module  # on the meta device
    original: dict[str, str]  # the model's names to the original ones, for the tensors that are there
    notes: list[str]  # what does not fit, one line each; empty unless `partial` was asked for


def load_transformer(
    path: str | Path, *, dtype: torch.dtype | None = None, num_attention_heads: int | None = None
) -> WanTransformer3DModel:
    """Loads a text-to-video transformer from one original-layout file.

    Args:
        path: .safetensors, or .pth / .pt (read with weights_only=True). The tensors may lie under a top-level key
            `generator_ema` (taken first), `generator`, `model` or `state_dict`; prefixes that training puts before
            their names (`model.`, `_fsdp_wrapped_module.`) are taken off.
        dtype: None keeps the file's dtypes; otherwise as in diffusers' from_pretrained, where the modules that
            need it stay in float32.
        num_attention_heads: Shapes do not tell it; None means heads of 128 channels, as in all published models.

    Returns:
        The model on the CPU, in eval mode.

    Raises:
        MemFlowError: The file cannot be read, or tensors are missing, unexpected or misshapen; they are named.
    """
    checkpoint = read_checkpoint(path)
    source = checkpoint.path.name
    if checkpoint.kind != "transformer":
        raise MemFlowError(f"{source}: holds no transformer but a {checkpoint.kind}")
    model, original, _ = layout_of(
        "transformer", checkpoint.tensors, source=source, num_attention_heads=num_attention_heads
    )
    weights = {name: checkpoint.tensors[old] for name, old in original.items()}
    if dtype is not None:
        weights = {name: tensor.to(kept_dtype(model, name, dtype)) for name, tensor in weights.items()}
    model.load_state_dict(weights, strict=True, assign=True)
    return model.requires_grad_(True).eval()


def read_checkpoint(path: str | Path, weights: str = GENERATORS[0]) -> Checkpoint:
    """Reads the file of an original repository.

    Args:
        path: .safetensors, or .pth / .pt (read with weights_only=True).
        weights: Which of `GENERATORS` is taken where a file holds both.

    Raises:
        MemFlowError: The file cannot be read, or is none of ours.
    """
    path = Path(path)
    content, generators = _unwrapped(_read(path), weights, path)
    tensors = _without_prefixes(content, path.name)
    for kind, sign in _SIGNS.items():
        if any(re.search(sign, name) for name in tensors):
            return Checkpoint(kind, path, tensors, generators)
    raise MemFlowError(
        f"{path}: neither a Wan transformer, VAE or UMT5 encoder in the original layout nor a LoRA; its "
        f"{len(tensors)} tensors are {listed(list(tensors))}"
    )


def layout_of(
    kind: str,
    tensors: Mapping[str, Tensor],
    *,
    source: str,
    num_attention_heads: int | None = None,
    partial: bool = False,
) -> Layout:
    """The model that tensors make up. Only names and shapes are looked at.

    Args:
        kind: "transformer" (text to video), "vae" (of Wan 2.1 or 2.2, any width) or "text_encoder" (a UMT5 encoder).
        tensors: By their original names.
        source: What messages call the file.
        num_attention_heads: Of a transformer; None = of 128 channels each.
        partial: Leave out what is missing, unexpected or misshapen, and name it in the notes.

    Raises:
        MemFlowError: Tensors are missing (by the library's names), unexpected or misshapen (by the file's).
    """
    rename, build = KINDS[kind]
    notes: list[str] = []

    def refuse(what: str, names: list[str]) -> None:
        if names and not partial:
            raise MemFlowError(f"{source}: {len(names)} {what} tensors: {listed(names)}")
        notes.extend(f"{what}: {name}" for name in names)

    def shape(name: str, ndim: int) -> torch.Size:
        if name not in tensors:
            raise MemFlowError(f"{source}: without {name} the size of the model is not known")
        found = tensors[name].shape
        if len(found) != ndim or 0 in found:
            needed = f"needs {ndim} dimensions" + ", none of them 0" * (0 in found)
            raise MemFlowError(f"{source}: 1 misshapen tensors: {name} {list(found)} ({needed})")
        return found

    if kind == "transformer":
        _refuse_image_to_video(tensors, source)
    try:  # run on the names themselves the mapping tells which is which
        mapped = rename({name: name for name in tensors})
    except Exception as error:
        raise MemFlowError(f"{source}: the names of its tensors cannot be mapped: {error}") from error
    with init_empty_weights():
        model = build(shape, source, _layers(tensors, source), num_attention_heads)
    tied = getattr(model, "_tied_weights_keys", None) or ()
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items() if name not in tied}
    refuse("missing", [name for name in wanted if name not in mapped])
    there = {new: mapped[new] for new in wanted if new in mapped}
    refuse("unexpected", sorted(tensors.keys() - set(there.values())))
    misshapen = [new for new, old in there.items() if tensors[old].shape != wanted[new]]
    needs = [f"{there[new]} {list(tensors[there[new]].shape)} (needs {list(wanted[new])})" for new in misshapen]
    refuse("misshapen", needs)
    return Layout(model, {new: old for new, old in there.items() if new not in misshapen}, notes)


def _refuse_image_to_video(tensors: Mapping[str, Tensor], source: str) -> None:
    """Left out in part, such a model would be another one."""
    image = [name for name in tensors if name.startswith("img_emb.") or ".cross_attn.k_img." in name]
    patches, head = tensors.get("patch_embedding.weight"), tensors.get("head.head.weight")
    if not image and patches is not None and head is not None and patches.ndim == 5 and head.ndim == 2:
        given, made = patches.shape[1], head.shape[0] // max(1, math.prod(patches.shape[2:]))
        image = [f"patch_embedding.weight of {given} channels for {made}"] if given > made else []
    if image:
        raise MemFlowError(
            f"{source}: is an image-to-video model ({listed(image)}); text-to-video models are converted, and "
            "a part of another is none"
        )


def kept_dtype(model: torch.nn.Module, name: str, dtype: torch.dtype) -> torch.dtype:
    """What `from_pretrained(dtype=dtype)` makes of the parameter `name`.

    Some modules stay in float32: with diffusers in every dtype, with transformers only against the range of float16.
    """
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    if kept.isdisjoint(name.split(".")) or (isinstance(model, PreTrainedModel) and dtype != torch.float16):
        return dtype
    return torch.float32


def listed(names: list[str]) -> str:
    """The first dozen of `names`, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(f"{name:.200}" for name in names[:_SHOWN]) + more


def read_object(path: Path, most: int = 2**24) -> dict[str, Any]:
    """The JSON object in a file; MemFlowError, which names the file, where there is none, or more than `most` bytes."""
    try:
        with open(path, "rb") as file:
            data, size = file.read(most + 1), os.fstat(file.fileno()).st_size
        content = json.loads(data) if len(data) <= most else None
    except (OSError, ValueError, RecursionError) as error:
        raise MemFlowError(f"{path}: cannot be read: {first_line(error)}") from None
    if len(data) > most:
        raise MemFlowError(f"{path}: has {size:,} bytes, at most {most:,} are read")
    if not isinstance(content, dict):
        raise MemFlowError(f"{path}: must hold options by name, it holds a {type(content).__name__}")
    return content


def _read(path: Path):
    """Whatever the file holds."""
    if path.suffix not in SUFFIXES:
        raise MemFlowError(f"{path}: a checkpoint is a .safetensors, .pth or .pt file")
    if not path.is_file():
        raise MemFlowError(f"{path}: there is no such file")
    try:
        archive = path.suffix != ".safetensors" and zipfile.is_zipfile(path)
        if archive:
            count = len(zipfile.ZipFile(path).namelist())
        else:
            count = len(safe_open(path, framework="pt").keys()) if path.suffix == ".safetensors" else 0
        if count <= _MOST_TENSORS:
            if path.suffix == ".safetensors":
                return load_file(path)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except Exception as error:  # a damaged pickle can raise anything
        raise Unreadable(f"{path}: not a readable checkpoint of tensors ({first_line(error)})") from error
    raise MemFlowError(f"{path}: holds {count} tensors, at most {_MOST_TENSORS} are read")


def _unwrapped(content, weights: str, path: Path) -> tuple[Mapping[str, Tensor], tuple[str, ...]]:
    """The tensors, and which of `GENERATORS` are there and not empty, the one that was taken first."""
    held = content if isinstance(content, Mapping) else {}
    generators = [key for key in GENERATORS if isinstance(held.get(key), Mapping) and held[key]]
    generators.sort(key=lambda key: key != weights)
    wrapper = next((key for key in (*generators, *_OTHER_WRAPPERS) if isinstance(held.get(key), Mapping)), None)
    content = held[wrapper] if wrapper else content
    if not isinstance(content, Mapping):
        raise MemFlowError(f"{path}: holds no tensors by name but a {type(content).__name__}")
    odd = [repr(n) for n in map(str, content) if not n.isprintable() or len(n) > _LONGEST_NAME]
    if odd:
        raise MemFlowError(f"{path}: a name is no printable text of at most {_LONGEST_NAME} characters: {odd[0]:.60}")
    others = [str(n) for n, entry in content.items() if not (isinstance(n, str) and isinstance(entry, Tensor))]
    if others:
        raise MemFlowError(f"{path}: {listed(others)}: not tensors by name")
    return content, tuple(generators)


def _without_prefixes(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """`tensors` without what wrappers (FSDP, compile, peft, a surrounding class) put before their names."""
    stripped = {}
    for name, tensor in tensors.items():
        short = _MODULE_WRAPPERS.sub("", name)
        while prefix := next((p for p in _PREFIXES if short.startswith(p)), ""):
            short = short.removeprefix(prefix)
        if short in stripped:
            raise MemFlowError(f"{source}: {short} is there twice, once as {name}")
        stripped[short] = tensor
    return stripped


def _layers(tensors: Mapping[str, Tensor], source: str) -> int:
    """Blocks, by their highest number."""
    numbers = {match[1] for name in tensors if (match := re.match(r"blocks\.(\d+)\.", name))}
    longest = max(numbers, key=lambda number: (len(number), number), default="0")
    if len(longest) > len(str(_MOST_LAYERS - 1)):
        raise MemFlowError(f"{source}: blocks.{longest:.20}: a model has at most {_MOST_LAYERS} blocks here")
    return 1 + max(map(int, numbers), default=0)

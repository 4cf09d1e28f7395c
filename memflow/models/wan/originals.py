"""Files of the original repositories: what they are, and their tensors by name, memory-mapped and out of wrappers."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from memflow.errors import MemFlowError

SUFFIXES = (".safetensors", ".pth", ".pt")
# Top-level keys of training checkpoints: the averaged weights and those trained, a whole model, an adapter.
GENERATORS = ("generator_ema", "generator")
_OTHER_WRAPPERS = ("model", "generator_lora")
_PREFIXES = ("base_model.model.", "model.", "diffusion_model.")
_SIGNS = {
    "lora": r"\.lora_(A|B|down|up)\.",
    "transformer": r"blocks\.\d+\.(self_attn|cross_attn|norm3)\.|patch_embedding\.|head\.head\.",
    "text_encoder": r"blocks\.\d+\.(attn|pos_embedding)\.|token_embedding\.",
    "vae": r"(encoder|decoder)\.(middle|downsamples|upsamples)\.",
}
_SHOWN = 12  # names listed in a message


class Checkpoint(NamedTuple):
    """The tensors of one original file. kind: "transformer", "vae", "text_encoder" or "lora".

    generators: which of `GENERATORS` the file holds, the one that `tensors` are of first.
    """

    kind: str
    path: Path
    tensors: dict[str, Tensor]
    generators: tuple[str, ...] = ()


def read_checkpoint(path: str | Path, weights: str = GENERATORS[0]) -> Checkpoint:
    """The file at `path`, recognised by the names of its tensors. Raises MemFlowError for what is none of ours.

    weights: which of `GENERATORS` is taken where a file holds both.
    """
    path = Path(path)
    content = _read(path)
    generators = _generators(content, weights)
    tensors = strip_prefixes(_unwrapped(content, generators, path), path.name)
    for kind, sign in _SIGNS.items():
        if any(re.search(sign, name) for name in tensors):
            return Checkpoint(kind, path, tensors, generators)
    raise MemFlowError(
        f"{path}: neither a Wan 2.1 transformer, VAE or UMT5 encoder in the original layout nor a LoRA; its "
        f"{len(tensors)} tensors are {listed(list(tensors))}"
    )


def read_tensors(path: str | Path) -> Mapping[str, Tensor]:
    """The tensors of a .safetensors, .pth or .pt file by the names they have there, out of their wrapper (the averaged
    weights, `generator_ema`, where there are two).

    Pickles are read with weights_only=True. Tensors are mapped from the file, so that nothing is in memory until it
    is looked at, except for .pth files from before torch 1.6, which cannot be mapped. Do not write to them.
    """
    path = Path(path)
    content = _read(path)
    return _unwrapped(content, _generators(content, GENERATORS[0]), path)


def _read(path: Path):
    """Whatever the file holds."""
    if path.suffix not in SUFFIXES:
        raise MemFlowError(f"{path}: a checkpoint is a .safetensors, .pth or .pt file")
    if not path.is_file():
        raise MemFlowError(f"{path}: there is no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged pickle can raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise MemFlowError(f"{path}: not a readable checkpoint of tensors ({reason})") from error


def _generators(content, weights: str) -> tuple[str, ...]:
    """Which of `GENERATORS` are there and not empty, `weights` first."""
    if not isinstance(content, Mapping):
        return ()
    there = [key for key in GENERATORS if isinstance(content.get(key), Mapping) and content[key]]
    return tuple(sorted(there, key=lambda key: key != weights))


def _unwrapped(content, generators: tuple[str, ...], path: Path) -> Mapping[str, Tensor]:
    for key in (*generators, *_OTHER_WRAPPERS):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping):
        raise MemFlowError(f"{path}: holds no tensors by name but a {type(content).__name__}")
    others = [str(name) for name, entry in content.items() if not isinstance(entry, Tensor)]
    if others:
        raise MemFlowError(f"{path}: {listed(others)}: not tensors")
    return content


def strip_prefixes(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """`tensors` without what wrappers (FSDP, peft, a surrounding class) put before their names."""
    stripped = {}
    for name, tensor in tensors.items():
        short = name.replace("_fsdp_wrapped_module.", "")
        while prefix := next((p for p in _PREFIXES if short.startswith(p)), ""):
            short = short.removeprefix(prefix)
        if short in stripped:
            raise MemFlowError(f"{source}: {short} is there twice, once as {name}")
        stripped[short] = tensor
    return stripped


def listed(names: list[str]) -> str:
    """The first dozen of `names`, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more

"""From the paths given to `memflow convert` to one transformer, one VAE, one text encoder, a tokenizer and LoRAs."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from memflow.convert.lora import Lora, read_lora
from memflow.errors import MemFlowError, first_line
from memflow.models.wan.checkpoints import GENERATORS, SUFFIXES, Checkpoint, Unreadable, read_checkpoint

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})\.safetensors")
_TOKENIZER_FILES = ("tokenizer.json", "spiece.model")


@dataclass
class Sources:
    """What was found."""

    models: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # tensors by kind and original name
    titles: dict[str, str] = field(default_factory=dict)  # how messages call a model, by its kind
    # Which of `checkpoints.GENERATORS` a model is, by its kind.
    generators: dict[str, str | None] = field(default_factory=dict)
    loras: list[Lora] = field(default_factory=list)
    tokenizer: PreTrainedTokenizerBase | None = None
    files: list[Path] = field(default_factory=list)  # all that were read
    unreadable: list[str] = field(default_factory=list)  # what is wrong with files of a folder that are damaged


def find_sources(
    paths: list[Path],
    lora_alpha: float | None = None,
    weights: str = GENERATORS[0],
    lora: tuple[int, float] | None = None,
) -> Sources:
    """What the given files are.

    Args:
        paths: Files as they are, folders with all in them that is recognised. A later path's model replaces an
            earlier's.
        lora_alpha: Of the LoRAs; None = what their files say.
        weights: As in `read_checkpoint`.
        lora: Rank and alpha of the preset's own LoRA, as in `read_lora`.

    Raises:
        MemFlowError: A file is none of ours, or not all there.
    """
    sources = Sources()
    for path in paths:
        if not path.exists():
            raise MemFlowError(f"{path}: there is no such file or folder")
        found, taken = Sources(), {lora.path.resolve() for lora in sources.loras}
        if path.is_dir():
            _take_folder(found, path, (lora_alpha, lora), weights)
        else:
            _take(found, read_checkpoint(path, weights), (lora_alpha, lora))
        sources.models |= found.models
        sources.titles |= found.titles
        sources.generators |= found.generators
        sources.loras += [lora for lora in found.loras if lora.path.resolve() not in taken]
        sources.tokenizer = found.tokenizer or sources.tokenizer
        sources.files += [file for file in found.files if file not in sources.files]
        sources.unreadable += found.unreadable
    return sources


def _take_folder(found: Sources, folder: Path, alphas: tuple, weights: str) -> None:
    for file in sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES):
        try:
            checkpoint = None if file in found.files else read_checkpoint(file, weights)
        except Unreadable as error:
            found.unreadable.append(str(error))
            continue
        except MemFlowError:
            continue  # other models may lie there too; what is missing in the end is said by name
        if checkpoint:
            _take(found, checkpoint, alphas)
    folders = sorted({file.parent for name in _TOKENIZER_FILES for file in folder.rglob(name)})
    if len(folders) > 1:
        folders = [path for path in folders if "umt5" in path.name] or folders
    if folders:
        found.tokenizer = _tokenizer(folders[0])
    if not found.files and not folders:
        raise MemFlowError(f"{folder}: holds no files that are known here")


def _take(found: Sources, checkpoint: Checkpoint, alphas: tuple) -> None:
    path, tensors = checkpoint.path, dict(checkpoint.tensors)
    shards, title = _shards(path), path.name
    if len(checkpoint.generators) > 1:
        title += f" ({checkpoint.generators[0]}, not its {checkpoint.generators[1]})"
    for shard in shards:
        if shard == path:
            continue
        more = read_checkpoint(shard)
        if more.kind != checkpoint.kind:
            raise MemFlowError(f"{shard}: a {more.kind}, and {path.name} is a {checkpoint.kind}")
        twice = sorted(tensors.keys() & more.tensors.keys())
        if twice:
            raise MemFlowError(f"{shard}: {twice[0]} is there twice")
        tensors |= more.tensors
    found.files += shards
    if checkpoint.kind == "lora":
        found.loras.append(read_lora(checkpoint._replace(tensors=tensors), *alphas))
        return
    if checkpoint.kind in found.models:
        kind = checkpoint.kind.replace("_", " ")
        raise MemFlowError(f"{path.parent}: holds two {kind}s, {found.titles[checkpoint.kind]} and {title}: name one")
    found.models[checkpoint.kind], found.titles[checkpoint.kind] = tensors, title
    found.generators[checkpoint.kind] = checkpoint.generators[0] if checkpoint.generators else None


def _shards(path: Path) -> list[Path]:
    """All files of the model that `path` is a part of."""
    match = _SHARD.fullmatch(path.name)
    if not match:
        return [path]
    total = int(match["total"])
    shards = [path.with_name(f"{match['stem']}-{i:05}-of-{total:05}.safetensors") for i in range(1, total + 1)]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise MemFlowError(f"{path}: is one of {total} files, and {', '.join(missing)} is not there")
    return shards


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # a tokenizer can be broken in many ways, in several libraries
        raise MemFlowError(f"{folder}: not a tokenizer that can be loaded ({first_line(error)})") from error

"""`memflow convert`: files of the original repositories become a folder that this pipeline and diffusers load.

Which file is what is told by the names of its tensors. Everything but the numbers of large files is checked before
anything is written; weights are streamed, finished files are kept when a conversion is interrupted, and
model_index.json, without which a folder is no pipeline, comes last.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from memflow.convert.lora import Lora, check_fits, write_lora
from memflow.convert.shards import DTYPES, Shard, Weight, check_room, plan_shards, write_shards
from memflow.convert.sources import Sources, find_sources
from memflow.errors import MemFlowError, shown
from memflow.files import write_whole
from memflow.models.wan.checkpoints import Layout, kept_dtype, layout_of, listed
from memflow.models.wan.published import MODELS, Preset, find_preset

_STEM = {"transformer": "diffusion_pytorch_model", "text_encoder": "model", "vae": "diffusion_pytorch_model"}
_RECORD = "conversion.json"


@dataclass(frozen=True)
class Conversion:
    """What `memflow convert` was asked for."""

    sources: list[Path]  # files, and folders of files
    output: Path  # the folder to write
    preset: str | None = None  # name of the published model that the folder is to be run as
    # Which of `checkpoints.GENERATORS` is taken; None = of a file that holds both, that of the preset.
    weights: str | None = None
    dtype: str | None = None  # name of a number format; None = that of the files
    lora_alpha: float | None = None  # of the LoRA's scale, alpha / rank; None = what its file says, else its rank
    keep_lora: bool = False  # write the LoRA beside the weights in place of merging it
    partial: bool = False  # convert what is there and fits
    heads: int | None = None  # attention heads of the transformer; None = of 128 channels each
    shard_bytes: int = 4 * 10**9  # most that one weight file holds


@dataclass(frozen=True)
class Part:
    """A model to write: its layout, and its weights in files."""

    layout: Layout
    shards: list[Shard] = field(default_factory=list)


def convert(request: Conversion) -> None:
    """Write the folder.

    Args:
        request: What is wanted.

    Raises:
        MemFlowError: Something is wrong with the sources or the output, nothing has been written then; or a weight
            holds NaN or infinity, or the disk is full.
    """
    console = Console(stderr=True, highlight=False, markup=False)
    preset = find_preset(request.preset) if request.preset else Preset()
    with console.status("reading"):
        sources = find_sources(request.sources, request.lora_alpha, request.weights or preset.weights, preset.lora)
        _refuse_incomplete(sources, request)
        parts = {name: _part(name, sources, request) for name in _STEM if name in sources.models}
        _refuse_strangers(parts, sources)
        _refuse_another_model(parts, sources, request.preset)
    record = _record(sources, request)
    _check_output(request.output, record, parts)
    for note in sources.unreadable:
        console.print(shown(f"left out: {note}"), soft_wrap=True)
    for name, part in parts.items():
        for note in part.layout.notes:
            console.print(shown(f"left out of the {name}: {note}"), soft_wrap=True)
    for lora in sources.loras:
        if lora.assumed_alpha:
            note = "no alpha is known: the rank is taken, a scale of 1; --lora-alpha gives another"
            console.print(shown(f"{lora.path.name}: {note}"), soft_wrap=True)
    try:
        request.output.mkdir(parents=True, exist_ok=True)
        text = json.dumps(record, indent=2) + "\n"
        write_whole(request.output / _RECORD, lambda file: file.write(text.encode()))
        _write(parts, request.output, console)
        if request.keep_lora:
            write_lora(sources.loras[0], parts["transformer"].layout.original, request.output)
        _finish(parts, sources, preset, request.output)
    except OSError as error:
        again = "what is finished stays, the same command goes on"
        raise MemFlowError(f"{request.output}: cannot be written: {error.strerror or error}; {again}") from error
    _show(parts, sources, request)


def _part(name: str, sources: Sources, request: Conversion) -> Part:
    tensors, title = sources.models[name], sources.titles[name]
    layout = layout_of(name, tensors, source=title, num_attention_heads=request.heads, partial=request.partial)
    loras: list[Lora] = sources.loras if name == "transformer" else []
    for lora in loras:
        check_fits(lora, {old: tensors[old] for old in layout.original.values()})
    merged = [] if request.keep_lora else loras
    dtype = getattr(torch, request.dtype) if request.dtype else None
    weights = [
        Weight(
            new,
            tensors[old],
            tensors[old].dtype if dtype is None else kept_dtype(layout.model, new, dtype),
            tuple(lora.updates[old] for lora in merged if old in lora.updates),
            f"{title}: {old}",
        )
        for new, old in layout.original.items()
    ]
    other = [f"{weight.name} ({weight.source.dtype})" for weight in weights if weight.source.dtype not in DTYPES]
    if other:
        raise MemFlowError(f"{title}: weights in number formats that are not known here: {listed(other)}")
    return Part(layout, plan_shards(weights, _STEM[name], request.shard_bytes))


def _refuse_strangers(parts: dict[str, Part], sources: Sources) -> None:
    """Parts of different models would be found out when the first chunk is decoded."""
    sizes, titles = {name: part.layout.model.config for name, part in parts.items()}, sources.titles
    for ours, other, theirs, said in (
        ("in_channels", "vae", "z_dim", "makes {} latent channels, and {} decodes {}"),
        ("text_dim", "text_encoder", "d_model", "takes embeddings of {} numbers, and {} makes {}"),
    ):
        if {"transformer", other} <= sizes.keys():
            made, taken = getattr(sizes["transformer"], ours), getattr(sizes[other], theirs)
            if made != taken:
                said = said.format(made, titles[other], taken)
                raise MemFlowError(f"{titles['transformer']} {said}: they belong to different models")


def _refuse_another_model(parts: dict[str, Part], sources: Sources, preset: str | None) -> None:
    """Run in the way of another model a transformer makes noise, or nothing that its memory was trained for."""
    if preset is None or "transformer" not in parts:
        return
    config = parts["transformer"].layout.model.config
    needed = {"in_channels": 16, "out_channels": 16, **MODELS[preset].transformer}
    wrong = [f"{name} {config[name]} (needs {size})" for name, size in needed.items() if config[name] != size]
    if wrong:
        title = sources.titles["transformer"]
        raise MemFlowError(f"{title} is not the model of --preset {preset}: {', '.join(wrong)}")


def _refuse_incomplete(sources: Sources, request: Conversion) -> None:
    missing = [name.replace("_", " ") for name in _STEM if name not in sources.models]
    if sources.tokenizer is None:
        missing.append("tokenizer (the folder google/umt5-xxl of the Wan repository)")
    if missing and not request.partial:
        raise MemFlowError(
            f"a pipeline needs more than the given files: no {', no '.join(missing)} among them; "
            f"{''.join(f'{note}; ' for note in sources.unreadable)}--partial converts what is there"
        )
    if not sources.models:
        raise MemFlowError("there is no model among the given files")
    if sources.loras and "transformer" not in sources.models:
        raise MemFlowError(f"{sources.loras[0].path.name}: a LoRA without the transformer that it belongs to")
    if request.weights and sources.generators.get("transformer") != request.weights:
        title = sources.titles.get("transformer", "the given files")
        raise MemFlowError(f"--weights {request.weights}: there are none of that name in {title}")
    if request.keep_lora and len(sources.loras) != 1:
        raise MemFlowError(f"--keep-lora is for one LoRA, {len(sources.loras)} are given")
    if request.lora_alpha is not None and not 0 < request.lora_alpha < math.inf:
        raise MemFlowError(f"--lora-alpha must be above 0, got {request.lora_alpha}")
    if request.lora_alpha is not None and not sources.loras:
        raise MemFlowError("--lora-alpha: there is no LoRA among the given files")


def _record(sources: Sources, request: Conversion) -> dict:
    """What a folder was made from; also tells whether an interrupted conversion may be continued."""
    files = [{"name": p.name, "bytes": p.stat().st_size, "modified": p.stat().st_mtime_ns} for p in sources.files]
    options = ("preset", "weights", "dtype", "lora_alpha", "keep_lora", "partial", "heads", "shard_bytes")
    scales = [{weight: update.scale for weight, update in lora.updates.items()} for lora in sources.loras]
    return {"files": files, "options": {name: getattr(request, name) for name in options}, "lora_scales": scales}


def _check_output(output: Path, record: dict, parts: dict[str, Part]) -> None:
    if output.exists() and not output.is_dir():
        raise MemFlowError(f"{output}: is no folder")
    if output.is_dir() and any(output.iterdir()):
        try:
            found = json.loads((output / _RECORD).read_text())
        except (OSError, ValueError):
            raise MemFlowError(f"{output}: holds something else; choose a new folder") from None
        if found != record:
            raise MemFlowError(f"{output}: holds another conversion (files or options differ); choose a new folder")
    needed = sum(shard.nbytes for part in parts.values() for shard in part.shards)
    there = sum(path.stat().st_size for path in output.rglob("*.safetensors")) if output.is_dir() else 0
    check_room(output, needed - there)


def _write(parts: dict[str, Part], output: Path, console: Console) -> None:
    columns = TextColumn("{task.description}"), BarColumn(bar_width=None), DownloadColumn(), TransferSpeedColumn()
    with Progress(*columns, TimeRemainingColumn(compact=True), console=console, disable=not console.is_terminal) as bar:
        for name, part in parts.items():
            task = bar.add_task(name.replace("_", " "), total=sum(shard.nbytes for shard in part.shards))
            folder = output / name
            folder.mkdir(exist_ok=True)
            write_shards(part.shards, folder, _STEM[name], lambda count, task=task: bar.advance(task, count))


def _finish(parts: dict[str, Part], sources: Sources, preset: Preset, output: Path) -> None:
    """Configurations, the tokenizer, and, where all is there, what makes the folder a pipeline."""
    for name, part in parts.items():
        model = part.layout.model
        if name == "text_encoder":
            model.config.dtype = part.shards[0].weights[0].dtype
            model.config.save_pretrained(output / name)
        else:
            model.save_config(output / name)
    if sources.tokenizer is not None:
        sources.tokenizer.save_pretrained(output / "tokenizer")
    if parts.keys() == _STEM.keys() and sources.tokenizer is not None:
        from memflow.stream.pipeline import MemFlowPipeline

        models = {name: part.layout.model for name, part in parts.items()}
        scheduler = preset.scheduler()
        scheduler.save_pretrained(output / "scheduler")
        pipeline = MemFlowPipeline(tokenizer=sources.tokenizer, scheduler=scheduler, **models, **preset.settings())
        pipeline.save_config(output)


def _show(parts: dict[str, Part], sources: Sources, request: Conversion) -> None:
    console = Console(highlight=False, markup=False)
    for name, part in parts.items():
        count = sum(len(shard.weights) for shard in part.shards)
        size = sum(shard.nbytes for shard in part.shards) / 1e9
        console.print(shown(f"{name:<13} {count} tensors, {size:.2f} GB, from {sources.titles[name]}"), soft_wrap=True)
    for lora in sources.loras:
        fate = "written beside the transformer" if request.keep_lora else "merged into the transformer"
        console.print(shown(f"{'lora':<13} {len(lora.updates)} updates, {fate}, from {lora.path.name}"), soft_wrap=True)
    if not (request.output / "model_index.json").is_file():
        console.print("no pipeline yet: some of its parts were not given", soft_wrap=True)
    elif request.preset is None:
        console.print("no preset recorded: `memflow generate --preset NAME` says how the model is run", soft_wrap=True)
    console.print(shown(f"{'folder':<13} {request.output}"), soft_wrap=True)

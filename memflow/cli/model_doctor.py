"""`memflow doctor --model`: what a model takes of a GPU, part by part and option by option, and what fits where."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from memflow.errors import MemFlowError
from memflow.memory.config import MemoryConfig
from memflow.models.wan.footprint import Footprint, Model, footprint
from memflow.models.wan.published import MODELS, Preset

GIB = 2**30
# Memory of cards as their makers name it, in GiB.
GPUS = {"rtx-3060": 12, "rtx-4080": 16, "rtx-4090": 24, "rtx-5090": 32, "a100-40gb": 40, "a100": 80, "h100": 80}
GPUS |= {"h200": 141, "b200": 180}
_RESERVE = 1.0  # GiB for the CUDA context and what libraries take


def examine(
    model: str,
    *,
    height: int | None = None,
    width: int | None = None,
    dtype: str | None = None,
    gpu: str | None = None,
) -> None:
    """Print the table for a folder or a preset. gpu: a name of GPUS or a number of GiB; None = those present."""
    described = describe(model, height, width)
    targets = _targets(gpu)
    found = footprint(described, dtype=getattr(torch, dtype or "bfloat16"))
    print(f"{model}: {described.height} x {described.width} pixels, {dtype or 'bfloat16'}, one story")
    print()
    for name, text, size in _parts(found, described):
        print(f"  {name:<18} {_gib(size)}  {text}")
    print()
    rows = options(found)
    width_of_names = max(len(name) for name, _ in rows)
    print(f"  {'in all':<{width_of_names}}      GiB  " + "  ".join(name for name, _ in targets))
    for name, size in rows:
        verdicts = (f"{'fits' if size / GIB + _RESERVE <= room else 'no':<{len(target)}}" for target, room in targets)
        print(f"  {name:<{width_of_names}} {_gib(size)}  " + "  ".join(verdicts).rstrip())
    print()
    print(f"  fits: with {_RESERVE:g} GiB to spare, for the CUDA context and workspaces of libraries")


def describe(model: str, height: int | None = None, width: int | None = None) -> Model:
    """The configurations in the folder `model`, or those of the published models of that preset."""
    folder = Path(model)
    if not folder.exists() and model in MODELS:
        row = MODELS[model]
        settings = (row.preset or Preset()).settings()
        configs = {"transformer": row.transformer, "vae": row.vae, "text_encoder": row.text_encoder}
    else:
        settings, configs = _read(folder)
    return Model(
        **configs,
        memory=MemoryConfig(**(settings.get("memory") or {})),
        text_length=settings.get("text_length", 512),
        height=height or settings.get("height", 480),
        width=width or settings.get("width", 832),
    )


def options(found: Footprint) -> list[tuple[str, int]]:
    """The ways to run a model, and the bytes that each takes at its fullest moment."""
    encoding = found.transformer + found.vae + found.text_encoder  # before there is a pool
    return [
        ("prompts encoded first, then told", max(found.peak(), encoding)),
        ("prompts known already", found.peak()),
        ("text encoder kept", found.peak(text_encoder=True)),
        ("prompts known, float8 linears", found.peak(float8=True)),
    ]


def _parts(found: Footprint, model: Model) -> list[tuple[str, str, int]]:
    memory = model.memory
    slots = f"bank {memory.bank_frames}, sink {memory.sink_frames}, window {memory.window_frames} latent frames"
    slots += ", and the pending one" if memory.published else ""
    return [
        ("transformer", "weights", found.transformer),
        ("text encoder", "weights; in memory only while prompts are encoded", found.text_encoder),
        ("VAE", "weights", found.vae),
        ("pool", f"keys and values of all layers: {slots}", found.pool),
        ("prompt", "cross-attention keys and values of all layers", found.prompt),
        ("VAE cache", "what the causal decoder remembers", found.vae_cache),
        ("denoising pass", "estimate: tensors alive at once", found.denoising),
        ("prompt switch", "estimate: the pass over the window that re-encodes it", found.recache),
        ("decoding", "estimate: one latent frame", found.decoding),
    ]


def _read(folder: Path) -> tuple[dict, dict[str, dict]]:
    if not (folder / "model_index.json").is_file():
        raise MemFlowError(f"--model {folder}: neither the folder of a pipeline nor one of {', '.join(MODELS)}")
    try:
        index = json.loads((folder / "model_index.json").read_text())
        parts = ("transformer", "vae", "text_encoder")
        configs = {part: json.loads((folder / part / "config.json").read_text()) for part in parts}
    except (OSError, ValueError) as error:
        raise MemFlowError(f"--model {folder}: cannot be read: {error}") from error
    found = [index.get(part, [None, None])[1] for part in parts]
    if found != ["WanTransformer3DModel", "AutoencoderKLWan", "UMT5EncoderModel"]:
        raise MemFlowError(f"--model {folder}: not a Wan model with its VAE and UMT5, but {', '.join(map(str, found))}")
    return index, {part: {k: v for k, v in config.items() if k[0] != "_"} for part, config in configs.items()}


def _targets(gpu: str | None) -> list[tuple[str, float]]:
    """(name, GiB) of the GPUs to fit."""
    if gpu is not None and gpu.lower() in GPUS:
        return [(gpu, GPUS[gpu.lower()])]
    if gpu is not None:
        try:
            room = float(gpu.lower().removesuffix("gib").removesuffix("gb"))
        except ValueError:
            room = 0.0
        if not 0 < room < 10_000:
            raise MemFlowError(f"--gpu {gpu}: neither a number of GiB nor one of {', '.join(GPUS)}")
        return [(f"{room:g} GiB", room)]
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        return [(device.name, device.total_memory / GIB) for device in devices]
    return [(f"{room} GiB", room) for room in (12, 16, 24, 40, 80)]


def _gib(size: int) -> str:
    return f"{size / GIB:8.2f}"

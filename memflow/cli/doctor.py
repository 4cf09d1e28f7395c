"""`memflow doctor`: what this machine can run, and why not the rest; with --model, what a model takes of a GPU, part by
part and option by option, and what fits where. Without a model nothing but Python is needed, and nothing fails."""

from __future__ import annotations

import os
import platform
import shutil
import textwrap
from collections.abc import Callable
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memflow.errors import MemFlowError, first_line, install_command, shown

if TYPE_CHECKING:
    from memflow.models.wan.footprint import Footprint, Model

_MODEL_PACKAGES = ("diffusers", "transformers", "peft", "safetensors", "av", "matplotlib")
GIB = 2**30
# Memory of cards as their makers name it, in GiB.
GPUS = {"rtx-3060": 12, "rtx-4080": 16, "rtx-4090": 24, "rtx-5090": 32, "a100-40gb": 40, "a100": 80, "h100": 80}
GPUS |= {"h200": 141, "b200": 180}
SHARED = (1, 2, 3, 4, 6, 8)  # processes
_RESERVE = 1.0  # GiB for the CUDA context and what libraries take


def doctor(model: str | None = None, **about) -> None:
    """Print the table of this machine; with a model, `about` as for `examine`, that of the model."""
    if model is not None:
        examine(model, **about)
        return
    given = [f"--{name}" for name, value in about.items() if value is not None]
    if given:
        raise MemFlowError(f"{', '.join(given)}: only with --model NAME, whose needs are computed")
    show(collect())


def collect() -> dict[str, Any]:
    """Facts about this machine, with plain values (strings, numbers, lists, dicts; None = absent). Nothing here fails.

    Keys: python, platform, cpu, memflow_kernels, torch, gpus, nvcc (version and path), cuda_kernels (where the compiled
    library is, or how it would be built, or why it cannot be), triton, backends (name to None or the reason why it
    cannot run), packages (name to version), libx264 (None or the reason).
    """
    return {
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "cpu": _cpu(),
        "memflow_kernels": _version("memflow-kernels"),
        "torch": _asked(_torch, _reason),
        "gpus": _asked(_gpus, lambda error: []),  # no driver, a broken driver, no torch
        "nvcc": _asked(_nvcc, lambda error: None),  # what stands under "CUDA kernels" says more
        "cuda_kernels": _asked(lambda: import_module("memflow_kernels.cuda.extension").described(), _reason),
        "triton": _version("triton"),
        "backends": _asked(
            lambda: import_module("memflow_kernels.backends").available_backends(),
            lambda error: {"every": _reason(error)},
        ),
        "packages": {name: _version(name) for name in _MODEL_PACKAGES},
        "libx264": _asked(_libx264, _reason),
    }


def show(facts: dict[str, Any]) -> None:
    """Print what `collect` found, with nothing but Python: the base install has no rich."""
    names = max(len(name) for _, rows in _rows(facts) for name, _, _ in rows)
    indent = " " * (9 + 5 + names + 2)
    width = max(60, shutil.get_terminal_size().columns)
    for section, rows in _rows(facts):
        for number, (name, good, text) in enumerate(rows):
            head = f"{section if number == 0 else '':<9}{'yes' if good else 'no':<5}{name:<{names}}  "
            print(
                textwrap.fill(shown(text), width, initial_indent=head, subsequent_indent=indent, break_on_hyphens=False)
            )
        print()


def _rows(facts: dict[str, Any]) -> list[tuple[str, list[tuple[str, bool, str]]]]:
    """(section, [(name, whether it is there, more about it)])."""
    cpu, torch = facts["cpu"], facts["torch"]
    machine = [
        ("python", True, f"{facts['python']}, {facts['platform']}"),
        ("cpu", True, f"{cpu['cores']} cores" + (f", {cpu['threads']} threads in torch" if cpu["threads"] else "")),
    ]
    if isinstance(torch, dict):
        cuda = f", CUDA {torch['cuda']}" if torch["cuda"] else ", built without CUDA"
        machine.append(("torch", True, torch["version"] + cuda))
    else:
        machine.append(("torch", False, torch))
    for gpu in facts["gpus"]:
        machine.append((gpu["name"], True, f"compute capability {gpu['capability']}, {gpu['memory_gib']} GiB"))
    if not facts["gpus"]:
        machine.append(("GPU", False, "none that torch can use: all runs on the CPU"))
    kernels = [
        (f"{name} backend", reason is None, reason or "works here") for name, reason in facts["backends"].items()
    ]
    kernels.append(("memflow-kernels", True, facts["memflow_kernels"] or "not installed as a package"))
    kernels.append(("triton package", facts["triton"] is not None, facts["triton"] or "not installed"))
    kernels.append(
        ("nvcc", facts["nvcc"] is not None, facts["nvcc"] or "not found; only building CUDA kernels needs it")
    )
    kernels.append(("CUDA kernels", facts["cuda_kernels"].startswith("built"), facts["cuda_kernels"]))
    packages = facts["packages"]
    stories = [(name, version is not None, version or "not installed") for name, version in packages.items()]
    if None in packages.values():
        stories.append(("all of them", False, install_command("model")))
    stories.append(("libx264", facts["libx264"] is None, facts["libx264"] or "video can be written"))
    return [("machine", machine), ("kernels", kernels), ("stories", stories)]


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _asked(ask: Callable[[], Any], otherwise: Callable[[Exception], Any]) -> Any:
    """What `ask` gives. A broken installation fails in many ways, and all of them are to be shown."""
    try:
        return ask()
    except Exception as error:
        return otherwise(error)


def _torch() -> dict[str, str | None]:
    torch = import_module("torch")
    return {"version": torch.__version__, "cuda": torch.version.cuda or torch.version.hip}


def _cpu() -> dict[str, int | None]:
    threads = _asked(lambda: import_module("torch").get_num_threads(), lambda error: None)  # said under "torch"
    affinity = getattr(os, "sched_getaffinity", None)
    return {"cores": len(affinity(0)) if affinity else os.cpu_count(), "threads": threads}


def _gpus() -> list[dict[str, Any]]:
    cuda = import_module("torch").cuda
    found = [cuda.get_device_properties(index) for index in range(cuda.device_count())]
    return [
        {"name": gpu.name, "capability": f"{gpu.major}.{gpu.minor}", "memory_gib": round(gpu.total_memory / 2**30)}
        for gpu in found
    ]


def _nvcc() -> str:
    toolchain = import_module("memflow_kernels.cuda.builder.toolchain")
    path = toolchain.find_nvcc()
    return f"{toolchain.nvcc_version(path)}, {path}"


def _libx264() -> str | None:
    there = "libx264" in import_module("av").codecs_available
    return None if there else "this build of PyAV has no libx264 encoder"


def _reason(error: Exception) -> str:
    said = first_line(error)
    return said if said == type(error).__name__ else f"{type(error).__name__}: {said}"


def examine(
    model: str, *, height: int | None = None, width: int | None = None, dtype: str | None = None, gpu: str | None = None
) -> None:
    """Print the table for a folder or a preset. gpu: a name of GPUS or a number of GiB; None = those present."""
    import torch

    from memflow.models.wan.footprint import footprint

    targets = _targets(gpu)
    try:
        described = describe(model, height, width)
        found = footprint(described, dtype=getattr(torch, dtype or "bfloat16"))
    except MemFlowError:
        raise
    except Exception as error:  # settings can be wrong in many ways, in several libraries
        raise MemFlowError(f"--model {model}: its settings are no model's: {_reason(error)}") from error
    print(f"{shown(model)}: {described.height} x {described.width} pixels, {dtype or 'bfloat16'}, one story")
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
    print(f"  {'one story over N processes':<{width_of_names}}      GiB  of the first, and of each other one")
    for count in SHARED:
        name = f"N = {count}"
        if count in found.processes:
            first, other = found.shared(count)
            verdict = f"{_gib(first)}  {_gib(other)}" if count > 1 else _gib(first)
        else:
            good = ", ".join(map(str, found.processes))
            verdict = f"      no  N must divide heads and tokens: {good}"
        print(f"  {name:<{width_of_names}} {verdict}")
    print()
    print(f"  fits: with {_RESERVE:g} GiB to spare, for the CUDA context and workspaces of libraries")


def describe(model: str, height: int | None = None, width: int | None = None) -> Model:
    """The configurations in the folder `model`, or those of the published models of that preset."""
    from memflow.memory.config import MemoryConfig
    from memflow.models.wan.footprint import Model
    from memflow.models.wan.published import MODELS, Preset

    folder = Path(model)
    if not os.path.exists(folder) and model in MODELS:
        row = MODELS[model]
        settings = (row.preset or Preset()).settings()
        configs = {"transformer": row.transformer, "vae": row.vae, "text_encoder": row.text_encoder}
    else:
        settings, configs = _read(folder)
    return Model(
        **configs,
        memory=MemoryConfig.from_dict(settings.get("memory") or {}),
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
    slots += ", and the pending one" if memory.published_mode else ""
    slots += f", {memory.held_frames} held" if memory.held_frames else ""
    slots += f", means of blocks of {memory.activation_block} tokens" if memory.activation_block else ""
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
    from memflow.models.wan.checkpoints import read_object
    from memflow.models.wan.published import MODELS

    if not os.path.isfile(folder / "model_index.json"):
        raise MemFlowError(f"--model {folder}: neither the folder of a pipeline nor one of {', '.join(MODELS)}")
    parts = ("transformer", "vae", "text_encoder")
    try:
        index = read_object(folder / "model_index.json")
        configs = {part: read_object(folder / part / "config.json") for part in parts}
    except MemFlowError as error:
        raise MemFlowError(f"--model {folder}: {error}") from error
    found = [index.get(part, [None, None])[1] for part in parts]
    if found != ["WanTransformer3DModel", "AutoencoderKLWan", "UMT5EncoderModel"]:
        raise MemFlowError(f"--model {folder}: not a Wan model with its VAE and UMT5, but {', '.join(map(str, found))}")
    return index, {part: {k: v for k, v in config.items() if k[0] != "_"} for part, config in configs.items()}


def _targets(gpu: str | None) -> list[tuple[str, float]]:
    """(name, GiB) of the GPUs to fit."""
    import torch

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

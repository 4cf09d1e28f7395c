"""The pipeline and the memory that a request asks for; every wrong wish becomes a MemFlowError in plain words."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import transformers
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE as LORA_WEIGHTS
from safetensors import safe_open

from memflow.cli.options import Request, lasting
from memflow.decoders import use_decoder
from memflow.errors import MemFlowError, first_line
from memflow.memory.config import MemoryConfig
from memflow.models.digests import encoder_digest, prompt_folder
from memflow.models.wan.checkpoints import listed, read_object
from memflow.models.wan.published import find_preset
from memflow.models.wan.text import PromptCache
from memflow.parallel.ranks import own_device
from memflow_kernels.backends import available_backends, refused, use_backend

if TYPE_CHECKING:
    from memflow.stream.pipeline import MemFlowPipeline

TINY = 10_000_000  # parameters


class Loaded(NamedTuple):
    """A model that is ready to tell stories. about: what a saved state keeps of it, to load it again."""

    pipeline: MemFlowPipeline
    device: torch.device
    about: dict[str, str]


def load(request, known: dict[str, str] | None = None) -> Loaded:
    """Load the model that a request asks for.

    Args:
        request: has the options model, preset, decoder, device, dtype, backend and prompt_cache; None = not given.
        known: what a saved state says of the model that made it.
    """
    known = known or {}
    device = choose_device(own_device(request.device))
    dtype = choose_dtype(known.get("dtype", request.dtype), device)
    model = request.model or known.get("model", "storybook")
    preset = request.preset or known.get("preset")
    decoder = request.decoder or known.get("decoder")
    with backend(request.backend, device):
        pipeline = load_pipeline(model, device, dtype, preset=preset, prompt_cache=request.prompt_cache)
        choose_threads(pipeline.transformer, device)
        if decoder:
            use_decoder(pipeline, decoder)
    about = {"model": lasting(model), "dtype": str(dtype).removeprefix("torch.")}
    about |= {"preset": preset} if preset else {}
    about |= {"decoder": str(Path(decoder).absolute())} if decoder else {}
    return Loaded(pipeline, device, about)


def choose_device(name: str | None) -> torch.device:
    """`name` as a device that is there; None: the GPU where there is one, else the CPU."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise MemFlowError(f"--device {name}: no such kind of device; cpu, cuda and cuda:1 are examples") from None
    if device.type not in ("cpu", "cuda"):
        raise MemFlowError(f"--device {name}: stories run on cpu and cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        reason = "no GPU can be used" if torch.version.cuda else "this torch was built without CUDA"
        raise MemFlowError(f"--device {name}: {reason}; `memflow doctor` tells more, --device cpu works anywhere")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise MemFlowError(f"--device {name}: there are {torch.cuda.device_count()} GPUs, counted from 0")
    return device


def choose_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """`name` as a dtype; None: bfloat16 on a GPU, else float32."""
    return getattr(torch, name or ("bfloat16" if device.type == "cuda" else "float32"))


def choose_threads(transformer: torch.nn.Module, device: torch.device) -> None:
    """Let a tiny model compute on one CPU core, unless OMP_NUM_THREADS says how many.

    Its layers take some 0.05 ms. Two cores are hardly faster then, and several times slower as soon as anything else,
    the writing of the video too, keeps one of them busy: each waits for the other at the end of every layer.
    """
    parameters = sum(parameter.numel() for parameter in transformer.parameters())
    if device.type == "cpu" and parameters < TINY and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def load_pipeline(
    model: str, device: torch.device, dtype: torch.dtype, *, preset: str | None = None, prompt_cache: bool = True
):
    """The `MemFlowPipeline` of the embedded model or of a folder, on `device`.

    A folder's text encoder is loaded only for prompts that have no embeddings yet; prompt_cache: look for them, and
    keep them, on disk. A LoRA that `memflow convert --keep-lora` left in the folder is loaded too. preset: run it as
    that published model, whatever the folder recorded.
    """
    folder, there = Path(model), os.path.exists(model)  # Path.exists() fails for a name that is too long
    if preset is not None:
        find_preset(preset)
    if not there and (os.sep in model or model.startswith(".")):
        raise MemFlowError(f"--model {model}: there is no such folder")
    if there and not (folder / "model_index.json").is_file():
        raise MemFlowError(f"--model {model}: not the folder of a saved pipeline, it has no model_index.json")
    from diffusers.utils import logging

    from memflow.stream.pipeline import MemFlowPipeline

    logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.set_verbosity_error()
    if not there:
        if preset is not None:
            raise MemFlowError("--preset is for --model FOLDER: the embedded model has settings of its own")
        pipeline = MemFlowPipeline.from_preset(model, dtype=dtype)
    else:
        _check_configurations(folder)
        try:
            pipeline = MemFlowPipeline.from_pretrained(folder, dtype=dtype, text_encoder=None, local_files_only=True)
            _check_weights(folder, transformer=pipeline.transformer, vae=pipeline.vae)
            if (folder / LORA_WEIGHTS).is_file():
                pipeline.load_lora_weights(folder, weight_name=LORA_WEIGHTS)
        except (ModuleNotFoundError, MemoryError):
            raise  # what helps is said elsewhere
        except Exception as error:  # a file can be broken in many ways, in several libraries
            raise MemFlowError(f"--model {model}: cannot be loaded: {first_line(error)}") from error
        if preset is not None:
            pipeline.use_preset(preset)
        encoder = encoder_digest(folder)
        pipeline.prompts = PromptCache(
            pipeline.tokenizer,
            lambda: _text_encoder(folder, device, dtype),
            pipeline.config.text_length,
            dtype=dtype,
            folder=prompt_folder(encoder) if prompt_cache else None,
            text_dim=pipeline.transformer.config.text_dim,
            encoder=encoder,
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def _check_configurations(folder: Path) -> None:
    """All must be objects: a text or a number diffusers takes for the name of a repository, and asks the hub for it."""
    for path in (folder / "model_index.json", *folder.glob("*/*config.json")):
        try:
            read_object(path)
        except MemFlowError as error:
            raise MemFlowError(f"--model {folder}: cannot be loaded: {error}") from None


def _check_weights(folder: Path, **models: torch.nn.Module) -> None:
    """A weight that no file holds has no numbers, a buffer those that it is made with."""
    for kind, model in models.items():
        files = list((folder / kind).glob("*.safetensors"))
        held = {name for file in files for name in safe_open(file, framework="pt").keys()}  # noqa: SIM118
        absent = [name for name, x in model.state_dict().items() if x.is_meta or (files and name not in held)]
        if absent:
            raise MemFlowError(f"{kind}: {len(absent)} of its weights are not there: {listed(absent)}")
    if not len(models["transformer"].blocks):
        raise MemFlowError("transformer: num_layers must be at least 1")


def _text_encoder(folder: Path, device: torch.device, dtype: torch.dtype):
    try:
        _, name = read_object(folder / "model_index.json")["text_encoder"]
        how = {"dtype": dtype, "local_files_only": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
        encoder, found = getattr(transformers, name).from_pretrained(folder / "text_encoder", **how)
    except (ModuleNotFoundError, MemoryError):
        raise
    except Exception as error:
        raise MemFlowError(f"--model {folder}: its text encoder cannot be loaded: {first_line(error)}") from error
    absent = sorted({*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])})
    if absent:  # transformers draws them at random
        said = f"{len(absent)} of its weights are not there, or have another size: {listed(absent)}"
        raise MemFlowError(f"--model {folder}: its text encoder cannot be loaded: {said}")
    return encoder.to(device).eval()


def choose_memory(
    policy: str | None, held: int | None, top_k: int | None, trained: MemoryConfig, **others
) -> MemoryConfig:
    """The memory that the model was trained for, with what else is asked for; None: it is not.

    policy: one of `memflow.cli.options.MEMORIES`. held: held_frames. others: further fields of `MemoryConfig`.
    """
    changes = {"held_frames": held, "top_k": top_k, **others}
    changes = {name: value for name, value in changes.items() if value is not None}
    bank = trained.bank_frames or MemoryConfig.bank_frames
    if policy == "published" and trained.positions != "absolute":
        raise MemFlowError(
            f"--memory published: the published code has absolute positions, this model {trained.positions}"
        )
    try:
        if policy == "published":
            if trained.published_mode:
                return trained.changed(**changes)
            return MemoryConfig.published(
                local_frames=trained.sink_frames + trained.window_frames,
                sink_frames=trained.sink_frames,
                bank_frames=bank,
                frames_per_chunk=trained.frames_per_chunk,
                **{"top_k": trained.top_k} | changes,
            )
        if policy is not None:
            ours = {"held_frames": None, "published_mode": None, "global_sink": True, "bank_frames": bank}
            changes = ours | changes | {"policy": policy}
        return trained.changed(**changes)
    except ValueError as error:
        given = {"memory": policy, "held": held, "top_k": top_k, **others}
        named = [name for name, value in given.items() if value is not None]
        # Of all that was given what the sentence begins with, else what changes most.
        blamed = next((name for name in named if str(error).startswith(name)), None)
        blamed = blamed or ("held" if held is not None else named[0] if named else "memory")
        raise MemFlowError(f"--{blamed.replace('_', '-')} {given[blamed]}: {error}") from None


def size_and_memory(request: Request, pipeline: MemFlowPipeline) -> dict[str, Any]:
    """What a request asks for, as `MemFlowPipeline.stream` takes it."""
    asked = request.memory, request.held, request.top_k, pipeline.memory_config
    height, width = pipeline.whole_size(request.height, request.width)
    return {"height": height, "width": width, "memory": choose_memory(*asked, **request.further_memory())}


@contextmanager
def backend(name: str | None, device: torch.device) -> Iterator[None]:
    """Run inside on one kernel backend; None: that of MEMFLOW_BACKEND, else the default of `device`."""
    source = "--backend" if name is not None else "MEMFLOW_BACKEND"
    name = name if name is not None else os.environ.get("MEMFLOW_BACKEND") or None
    if name is None:
        yield
        return
    backends = available_backends()
    if name not in backends:
        raise MemFlowError(f"{source} {name}: unknown; there are {', '.join(backends)}")
    reason = backends[name] or refused(name, device)
    if reason is not None:
        raise MemFlowError(f"{source} {name}: {reason}")
    with use_backend(name):
        yield

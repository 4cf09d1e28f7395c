"""A stream on disk: one safetensors file with its tensors, its plan and settings as JSON, and a digest over it all."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from memflow.errors import MemFlowError
from memflow.files import tensors_header, write_whole
from memflow.memory.config import MemoryConfig
from memflow.models.digests import weights_digest
from memflow.stream.plan import Plan

if TYPE_CHECKING:
    from memflow.models.base import VideoModel

FORMAT = "memflow-stream-2"
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_PARTS = {"plan": dict, "config": dict, "seeds": list, "height": int, "width": int, "counters": dict}
_ENCODER = ("text_encoder", "text_encoder_files")  # one of them, or neither: compared where both sides have it
_PARTS |= {"timings": dict, "model": dict, "extra": dict}


def save_stream(stream, path, extra: dict[str, str]) -> None:
    """Write `stream` to `path`; a file that is already there is replaced only when the new one is complete.

    Of several processes that make the story together all call this, and the first writes.
    """
    tensors, counters = stream.driver.state_dict()
    stream.ranks.from_first(lambda: _save(stream, path, extra, tensors, counters))


def _save(stream, path, extra: dict[str, str], tensors: dict[str, Tensor], counters: dict[str, int]) -> None:
    tensors |= {f"decoder.{name}": tensor for name, tensor in stream.decoder.state_dict().items()}
    tensors["noise"] = stream.noise.state()
    tensors = dict(sorted(tensors.items()))
    header = {
        "plan": stream.plan.to_dict(),
        "config": stream.config.to_dict(),
        "seeds": stream.seeds,
        "height": stream.height,
        "width": stream.width,
        "counters": counters,
        "timings": stream.timings,
        "model": identity_of(stream.pipeline, stream.driver.model),
        "extra": extra,
    }
    text = json.dumps(header)
    metadata = {"format": FORMAT, "stream": text, "digest": _digest(text, tensors)}
    try:
        write_whole(path, lambda file: _write(file, metadata, tensors))
    except OSError as error:
        raise MemFlowError(f"the state cannot be written to {path}: {error.strerror}") from error


def identity_of(pipeline, model: VideoModel) -> dict:
    """What a saved stream must find again: digests of the weights, and the settings that decide what comes out.

    The text encoder goes by its weights where it is in memory and by its files where a `PromptCache` loads it; the
    one says nothing about the other.
    """
    text, encoder, vae = {}, pipeline.text_encoder, pipeline.vae
    if pipeline.prompts is not None:
        if pipeline.prompts.encoder is not None:
            text = {"text_encoder_files": pipeline.prompts.encoder}
    elif encoder is not None:
        text = {"text_encoder": weights_digest(encoder)}
    return text | {
        "transformer": model.identity(),
        "vae": f"{type(vae).__name__} {weights_digest(vae)}",
        "denoising_steps": list(pipeline.config.denoising_steps),
        "first_denoising_steps": pipeline.config.first_denoising_steps,
        "sigmas": pipeline.schedule.sigmas,
        "dtype": str(pipeline.transformer.dtype),
    }


def read_header(path, *, digest: bool = True) -> dict:
    """Plan and settings of a saved stream.

    Args:
        path: the file.
        digest: also read all of it, and make sure that it is what was written.

    Raises:
        MemFlowError: no such file, not a state, one of another version, or a damaged one.
    """
    return _read(path, digest)[0]


def load_stream(pipeline, path, make: Callable, model: Callable[..., VideoModel]):
    """The stream that was saved to `path`.

    Args:
        pipeline: holds the model that it was saved with.
        path: the file.
        make: `Stream`.
        model: makes the `VideoModel` of a transformer.

    Raises:
        MemFlowError: as `read_header`; another model; or a state that no stream could have saved.
    """
    header, tensors = _read(path, digest=True)
    identity = identity_of(pipeline, model(pipeline.transformer))
    saved = header["model"]
    names = {*identity, *saved} - ({*_ENCODER} - ({*identity} & {*saved}))
    differing = sorted(name for name in names if identity.get(name) != saved.get(name))
    if differing:
        known = [name for name in differing if name in identity]  # others are whatever the file says
        parts = ", ".join(known + ["parts that this one has not"] * (len(known) < len(differing)))
        raise MemFlowError(f"{path} was saved with another model, it differs in: {parts}")
    try:
        stream = make(
            pipeline,
            plan=Plan.from_dict(header["plan"]),
            config=MemoryConfig.from_dict(header["config"]),
            seeds=header["seeds"],
            height=header["height"],
            width=header["width"],
        )
        stream.timings |= {name: float(header["timings"][name]) for name in stream.timings}
        stream.extra = header["extra"]
        stream.noise.set_state(tensors.pop("noise"))
        decoder = {name[8:]: tensors.pop(name) for name in list(tensors) if name.startswith("decoder.")}
        stream.decoder.load_state_dict(decoder)
        if "history" in tensors and tensors["history"].dtype != torch.float32:
            raise ValueError(f"history must be torch.float32, got {tensors['history'].dtype}")
        stream.driver.load_state_dict(tensors, header["counters"])
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # the digest was right: somebody made this file
        reason = f"{type(error).__name__}: {error}" if isinstance(error, (KeyError, IndexError)) else str(error)
        raise MemFlowError(f"{path} is not the state of a stream of this model: {' '.join(reason.split())}") from error
    return stream


def _read(path, digest: bool) -> tuple[dict, dict[str, Tensor]]:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise MemFlowError(f"{path} cannot be read as the state of a stream: it is not a regular file")
        # One open file for all: another process may put a newer state in its place meanwhile.
        with safe_open(Path(path), framework="pt") as file:
            metadata = file.metadata() or {}
            header = _header(path, metadata)
            # Cloned into memory of their own: arithmetic on tensors at odd addresses may round differently.
            tensors = {name: file.get_tensor(name).clone() for name in sorted(file.keys())} if digest else {}
    except (OSError, SafetensorError) as error:
        raise MemFlowError(f"{path} cannot be read as the state of a stream: {error}") from error
    if digest and metadata.get("digest") != _digest(metadata["stream"], tensors):
        raise MemFlowError(f"{path} is damaged: its contents are not those that were saved")
    return header, tensors


def _header(path, metadata: dict[str, str]) -> dict:
    form = metadata.get("format")
    if form == "memflow-stream-1":
        raise MemFlowError(f"{path} was saved by MemFlow 0.1, whose states cannot be resumed: tell the story again")
    if form != FORMAT:
        newer = isinstance(form, str) and form.startswith("memflow-stream-")
        hint = " (a newer version of this package may read it)" if newer else ""
        raise MemFlowError(f"{path} is not the state of a stream: its format is {form!r}, not {FORMAT!r}{hint}")
    try:
        header = json.loads(metadata["stream"])
        if not isinstance(header, dict):
            raise TypeError("its header is not an object")
        for name, kind in _PARTS.items():
            if not isinstance(header.get(name), kind):
                raise TypeError(f"{name} must be {kind.__name__}, got {type(header.get(name)).__name__}")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise MemFlowError(f"{path} is damaged: its header cannot be read: {error}") from None
    return header


def _digest(text: str, tensors: dict[str, Tensor]) -> str:
    total = hashlib.sha256(text.encode())
    for name, tensor in tensors.items():
        total.update(f"\n{name} {_DTYPES.get(tensor.dtype)} {list(tensor.shape)}\n".encode())
        total.update(_bytes(tensor))
    return total.hexdigest()


def _write(file, metadata: dict[str, str], tensors: dict[str, Tensor]) -> None:
    """The safetensors format, a tensor at a time: the library's own `save` makes a second copy of them all."""
    entries = ((name, _DTYPES[x.dtype], list(x.shape), x.numel() * x.itemsize) for name, x in tensors.items())
    file.write(tensors_header(metadata, entries))
    for tensor in tensors.values():
        file.write(_bytes(tensor))


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())

"""A stream on disk: one safetensors file with its tensors, and its plan and settings as JSON in the header."""

from __future__ import annotations

import json
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from memflow.errors import MemFlowError
from memflow.memory.config import MemoryConfig
from memflow.stream.plan import Plan

FORMAT = "memflow-stream-2"


def save_stream(stream, path, extra: dict[str, str]) -> None:
    """Write `stream` to `path`; a file that is already there is replaced only when the new one is complete."""
    tensors, counters = stream.driver.state_dict()
    tensors |= {f"decoder.{name}": tensor for name, tensor in stream.decoder.state_dict().items()}
    tensors["noise"] = stream.noise.state()
    header = {
        "plan": stream.plan.to_dict(),
        "config": stream.config.to_dict(),
        "seeds": stream.seeds,
        "height": stream.height,
        "width": stream.width,
        "counters": counters,
        "timings": stream.timings,
        "model": stream.pipeline.identity(),
        "extra": extra,
    }
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(tensors, partial, metadata={"format": FORMAT, "stream": json.dumps(header)})
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise MemFlowError(f"the state cannot be written to {path}: {error}") from error


def read_header(path) -> dict:
    """Plan and settings of a saved stream."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise MemFlowError(f"{path} cannot be read as the state of a stream: {error}") from error
    if metadata.get("format") == "memflow-stream-1":
        raise MemFlowError(f"{path} was saved by MemFlow 0.1, whose states cannot be resumed: tell the story again")
    if metadata.get("format") != FORMAT:
        raise MemFlowError(
            f"{path} is not the state of a stream: its format is {metadata.get('format')!r}, not {FORMAT!r}"
        )
    return json.loads(metadata["stream"])


def load_stream(pipeline, path, make):
    """The stream that was saved to `path`, on `pipeline`, which must hold the model that it was saved with; `make` is
    `Stream`."""
    header = read_header(path)
    identity = pipeline.identity()
    # A state that was saved by an earlier version may say less.
    differing = [f"{k}: saved {v}, here {identity.get(k)}" for k, v in header["model"].items() if identity.get(k) != v]
    if differing:
        raise MemFlowError(f"{path} was saved with another model ({'; '.join(differing)})")
    stream = make(
        pipeline,
        plan=Plan.from_dict(header["plan"]),
        config=MemoryConfig.from_dict(header["config"]),
        seeds=header["seeds"],
        height=header["height"],
        width=header["width"],
    )
    with safe_open(path, framework="pt") as file:
        # Cloned into memory of their own: arithmetic on tensors at odd addresses may round differently.
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
    stream.timings, stream.extra = header["timings"], header["extra"]
    stream.driver.load_state_dict(tensors, header["counters"])
    try:
        stream.decoder.load_state_dict(_under("decoder.", tensors))
    except ValueError as error:
        raise MemFlowError(f"{path}: the decoder's state does not fit this model's VAE: {error}") from error
    stream.noise.set_state(tensors["noise"])
    return stream


def _under(prefix: str, tensors: dict) -> dict:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}

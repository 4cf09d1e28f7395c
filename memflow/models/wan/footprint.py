"""What a model takes of a GPU's memory, computed from shapes: nothing is loaded and no GPU is needed.

Weights, pool, prompt and the VAE's cache are exact. Activations are an estimate: the model's own code is run on tensors
of torch's meta device, which have shapes and no data, and those alive at the same time are added up. What libraries
take beside them (workspaces, the CUDA context, gaps between allocations) is not in it.
"""

from __future__ import annotations

import warnings
from contextlib import suppress
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import UMT5Config, UMT5EncoderModel

from memflow.decoders.wan import WanDecoder
from memflow.errors import MemFlowError
from memflow.memory.attention import Pass
from memflow.memory.config import MemoryConfig
from memflow.memory.frames import make_memory
from memflow.memory.views import Prompt
from memflow.models.wan.adapter import WanModel
from memflow.models.wan.attention import CleanPassDone
from memflow.models.wan.checkpoints import kept_dtype
from memflow.models.wan.float8 import float8_linears
from memflow.parallel.ranks import numbers_that_do


@dataclass(frozen=True)
class Model:
    """Configurations of a pipeline's models, as in their config.json, and its settings."""

    transformer: dict
    vae: dict
    text_encoder: dict
    memory: MemoryConfig
    text_length: int = 512
    height: int = 480
    width: int = 832


@dataclass(frozen=True)
class Footprint:
    """Bytes of each part. All but the activations are exact. processes: how many can make a story together."""

    transformer: int
    transformer_float8: int
    text_encoder: int
    vae: int
    pool: int
    prompt: int
    vae_cache: int
    denoising: int
    recache: int
    decoding: int
    processes: tuple[int, ...]

    def resident(self, *, float8: bool = False) -> int:
        """What is there all the time while a story is told, without the text encoder."""
        weights = self.transformer_float8 if float8 else self.transformer
        return weights + self.vae + self.pool + self.prompt + self.vae_cache

    def peak(self, *, float8: bool = False, text_encoder: bool = False) -> int:
        """At the fullest moment. text_encoder: it stays in memory too (it need not: prompts are encoded first)."""
        passing = max(self.denoising, self.recache, self.decoding)
        return self.resident(float8=float8) + passing + (self.text_encoder if text_encoder else 0)

    def shared(self, processes: int) -> tuple[int, int]:
        """At the fullest moment, where several processes make a story together: in the first, which decodes, and in
        each of the others. Weights and prompt are in all of them whole."""
        pool, passing = self.pool // processes, -(-max(self.denoising, self.recache) // processes)
        others = self.transformer + self.vae + self.prompt + pool
        return others + self.vae_cache + max(passing, self.decoding), others + passing


def footprint(model: Model, *, dtype: torch.dtype = torch.bfloat16) -> Footprint:
    """What a model takes for one story.

    Args:
        model: Its configurations and settings.
        dtype: Of the weights.

    Raises:
        MemFlowError: Sizes that do not fit the model.
    """
    with torch.device("meta"):
        transformer = WanTransformer3DModel.from_config(model.transformer)
        vae = AutoencoderKLWan.from_config(model.vae)
        text_encoder = UMT5EncoderModel(UMT5Config(**model.text_encoder))
    patch, factor = transformer.config.patch_size, WanDecoder(vae).spatial_factor
    for name, pixels, step in (("height", model.height, patch[1]), ("width", model.width, patch[2])):
        if pixels % (step * factor):
            raise MemFlowError(f"{name} must be a multiple of {step * factor} pixels for this model, got {pixels}")
    parts = {"transformer": transformer, "text_encoder": text_encoder, "vae": vae}
    weights = {name: _weights(part, dtype) for name, part in parts.items()}
    converted = [transformer.get_submodule(name).weight for name in float8_linears(transformer)]
    # What stays of each number is one byte, and to each row comes a float32 scale.
    saved = sum(weight.numel() * (dtype.itemsize - 1) - 4 * len(weight) for weight in converted)
    latents = (1, transformer.config.in_channels, model.height // factor, model.width // factor)
    grid = latents[2] // patch[1], latents[3] // patch[2]
    shape = {"batch": 1, "grid": grid, "dtype": dtype, "device": torch.device("meta")}
    pool = make_memory(model.memory, **_heads(transformer), **shape).pool.nbytes
    with torch.device("meta"), torch.no_grad(), _Fused(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wan = _shallow(model.transformer, dtype)
        sizes = _heads(wan.transformer)
        memory = make_memory(model.memory, **sizes, **shape)
        key = torch.empty(sizes["layers"], 1, model.text_length, sizes["heads"], sizes["head_dim"], dtype=dtype)
        prompt = Prompt(key, torch.empty_like(key), torch.ones(1, model.text_length, dtype=torch.bool))
        memory.bank_used = memory.recorded = model.memory.bank_frames
        start = 10 * (model.memory.sink_frames + model.memory.window_frames) * model.memory.frames_per_chunk
        denoising = _pass(wan, memory.pass_over(start, model.memory.frames_per_chunk, prompt), latents, clean=False)
        first, count = memory.recache_span(start)
        recache = _pass(wan, memory.pass_over(first, count, prompt), latents, clean=True) if count else 0
        _set_weights(vae, weights["vae"])
        decoder = WanDecoder(vae)
        latent = torch.empty(*latents[:2], 1, *latents[2:], dtype=dtype)
        for _ in range(2):  # until the cache is as large as it gets
            decoder._frame(latent)
        with _Peak() as decoding:
            decoder._frame(latent)
        cache = sum(entry.nbytes for entry in decoder.cache if isinstance(entry, torch.Tensor))
    return Footprint(
        transformer=_total(weights["transformer"]),
        transformer_float8=_total(weights["transformer"]) - saved,
        text_encoder=_total(weights["text_encoder"]),
        vae=_total(weights["vae"]),
        pool=pool,
        prompt=2 * key.nbytes * transformer.config.num_layers // sizes["layers"],
        vae_cache=cache,
        denoising=denoising,
        recache=recache,
        decoding=decoding.peak,
        processes=tuple(numbers_that_do(sizes["heads"], memory.call_tokens())),
    )


def _shallow(config: dict, dtype: torch.dtype) -> WanModel:
    """The model with two layers, which tell: layers do not add up in activations."""
    transformer = WanTransformer3DModel.from_config({**config, "num_layers": 2})
    weights = _weights(transformer, dtype)
    # A memory wants weights that are there: here one number each, until it is installed.
    there = {name: torch.zeros((), device="cpu").expand(shape) for name, (shape, _) in weights.items()}
    transformer.load_state_dict(there, assign=True)
    model = WanModel(transformer.eval())
    _set_weights(transformer, weights)
    return model


def _pass(model: WanModel, step: Pass, latents: tuple[int, int, int, int], *, clean: bool) -> int:
    """Bytes that a call takes beside weights, pool and prompt."""
    batch, channels, rows, columns = latents
    # Not by the model's `denoise` and `write_clean`: they switch autocast off, which the meta device does not know.
    with _Peak() as peak, model.context.during(step, clean=clean), suppress(CleanPassDone):
        noisy = torch.empty(batch, channels, len(step.slots), rows, columns, dtype=model.dtype)
        timestep, no_text = torch.empty(batch), noisy.new_empty((batch, 0, model.text_dim))
        model.transformer(noisy, timestep, no_text, return_dict=False)
    return peak.peak


def _heads(transformer: WanTransformer3DModel) -> dict[str, int]:
    config = transformer.config
    return {"layers": config.num_layers, "heads": config.num_attention_heads, "head_dim": config.attention_head_dim}


def _weights(model: nn.Module, dtype: torch.dtype) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shapes and dtypes as `from_pretrained(dtype=dtype)` makes them, shared ones once."""
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    return {
        name: (parameter.shape, kept_dtype(model, name, dtype))
        for name, parameter in model.state_dict().items()
        if name not in tied
    }


def _total(weights: dict[str, tuple[torch.Size, torch.dtype]]) -> int:
    return sum(shape.numel() * dtype.itemsize for shape, dtype in weights.values())


def _set_weights(model: nn.Module, weights: dict[str, tuple[torch.Size, torch.dtype]]) -> None:
    """Give `model` weights of these shapes and dtypes, on the meta device."""
    empty = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in weights.items()}
    model.load_state_dict(empty, assign=True)


class _Fused(TorchFunctionMode):
    """Attention and RMS norms by one kernel each, as on other devices: what comes out, and a float32 number for each
    row. On the meta device they are made of many operators, with the scores among their results."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func not in (functional.scaled_dot_product_attention, functional.rms_norm):
            return func(*args, **(kwargs or {}))
        x = args[0]
        return (x.new_empty(x.shape[:-1], dtype=torch.float32), torch.empty_like(x))[1]  # both are there at once


class _Peak(TorchDispatchMode):
    """Adds up the memory of the tensors that live inside: `peak` is the most there was beyond what there was before."""

    def __init__(self):
        super().__init__()
        self.peak = 0
        self._released = 0  # bytes that were there before and are not any more
        self._alive: dict[int, tuple[StorageWeakRef, int, bool]] = {}  # reference, bytes, made inside

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self._see((args, kwargs), made=False)
        result = func(*args, **(kwargs or {}))
        self._see(result, made=True)
        self._forget()
        self.peak = max(self.peak, sum(size for _, size, made in self._alive.values() if made) - self._released)
        return result

    def _see(self, tensors, *, made: bool) -> None:
        """What is first seen as an argument was there before."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                known = self._alive.get(reference.cdata)
                if known is not None and known[0].expired():
                    self._forget()
                    known = None
                if known is None:
                    self._alive[reference.cdata] = reference, storage.nbytes(), made

    def _forget(self) -> None:
        gone = [key for key, (reference, _, _) in self._alive.items() if reference.expired()]
        self._released += sum(size for _, size, made in map(self._alive.pop, gone) if not made)

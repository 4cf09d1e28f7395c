"""What a model takes of a GPU's memory, computed from shapes: nothing is loaded and no GPU is needed.

Weights, pool, prompt and the VAE's cache are exact. Activations are an estimate: the model's own code is run on fake
tensors, which have shapes and no data, and the tensors alive at the same time are added up. What libraries take beside
them (workspaces, the CUDA context, gaps between allocations) is not in it.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import UMT5Config, UMT5EncoderModel

from memflow.decoders.wan import WanDecoder
from memflow.errors import MemFlowError
from memflow.memory.config import MemoryConfig
from memflow.memory.frames import make_memory
from memflow.memory.views import Prompt
from memflow.models.wan.adapter import WanModel
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


def footprint(model: Model, *, dtype: torch.dtype = torch.bfloat16, batch: int = 1) -> Footprint:
    """What a model takes.

    Args:
        model: Its configurations and settings.
        dtype: Of the weights.
        batch: Stories at once.

    Raises:
        MemFlowError: Sizes that do not fit the model.
    """
    with init_empty_weights():
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
    latents = (batch, transformer.config.in_channels, model.height // factor, model.width // factor)
    grid = latents[2] // patch[1], latents[3] // patch[2]
    shape = {"batch": batch, "grid": grid, "dtype": dtype}
    memory = make_memory(model.memory, **_heads(transformer), **shape, device=torch.device("meta"))
    pool = memory.pool.nbytes
    with FakeTensorMode(), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Layers do not add up in activations: two of them tell.
        with init_empty_weights():
            shallow = WanTransformer3DModel.from_config({**model.transformer, "num_layers": 2})
        fake, fake_vae = _fake(shallow, _weights(shallow, dtype)), _fake(vae, weights["vae"])
        fake = WanModel(fake)
        sizes = _heads(fake.transformer)
        memory = make_memory(model.memory, **sizes, **shape, device=torch.device("cpu"))
        key = torch.empty(sizes["layers"], batch, model.text_length, sizes["heads"], sizes["head_dim"], dtype=dtype)
        prompt = Prompt(key, torch.empty_like(key), torch.ones(batch, model.text_length, dtype=torch.bool))
        memory.bank_used = memory.recorded = model.memory.bank_frames
        start = 10 * (model.memory.sink_frames + model.memory.window_frames) * model.memory.frames_per_chunk
        denoise = lambda noisy, step: fake.denoise(noisy, 1000.0, step)  # noqa: E731
        denoising = _pass(memory, prompt, latents, start, model.memory.frames_per_chunk, dtype, denoise)
        _, span = memory.recache_span(start)
        recache = _pass(memory, prompt, latents, start - span, span, dtype, fake.write_clean) if span else 0
        decoder = WanDecoder(fake_vae)
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


def _pass(memory, prompt, latents, start: int, frames: int, dtype, run) -> int:
    """Bytes that a call over `frames` frames takes beside weights, pool and prompt."""
    step = memory.pass_over(start, frames, prompt)
    with _Peak() as peak:
        batch, channels, rows, columns = latents
        noisy = torch.empty(batch, channels, frames, rows, columns, dtype=dtype)
        run(noisy, step)
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


def _fake(model: nn.Module, weights: dict[str, tuple[torch.Size, torch.dtype]]) -> nn.Module:
    """`model` with fake tensors for weights; to be called under a FakeTensorMode."""
    for name, (shape, dtype) in weights.items():
        module, _, parameter = name.rpartition(".")
        holder = model.get_submodule(module)
        holder._parameters[parameter] = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
    return model.eval()


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
                known = self._alive.get(storage._cdata)
                if known is not None and known[0].expired():
                    self._forget()
                    known = None
                if known is None:
                    self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes(), made

    def _forget(self) -> None:
        gone = [key for key, (reference, _, _) in self._alive.items() if reference.expired()]
        self._released += sum(size for _, size, made in map(self._alive.pop, gone) if not made)

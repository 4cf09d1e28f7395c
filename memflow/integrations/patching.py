"""`patch(model)`: our attention in place of a causal Wan self-attention, over the cache that the caller keeps.

The contract of the calls is described in docs/integrations.md; it follows the published system's description.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from memflow.integrations.attention import CallerAttention
from memflow.integrations.cache import put_in_order
from memflow.integrations.checks import GridSizes, Inputs, check_module
from memflow.memory.config import MemoryConfig

ATTRIBUTES = ("q", "k", "v", "o", "norm_q", "norm_k", "num_heads")
PARAMETERS = ("x", "grid_sizes", "kv_cache", "current_start")


class PatchedCall(NamedTuple):
    """What a patched self-attention has just done, for `patch(returns=...)`.

    output: [B, L, C]. kv_cache: the caller's dictionary. stored: whether the call counts in its indices.
    global_end, local_end: the indices in tokens as they are now.
    """

    output: Tensor
    kv_cache: dict
    stored: bool
    global_end: int
    local_end: int


Returns = Callable[[PatchedCall], object]


def patch(
    model: nn.Module,
    *,
    memory: MemoryConfig | None = None,
    returns: Returns | None = None,
) -> list[str]:
    """Replace every self-attention of the causal Wan kind in `model`; returns the names of the patched modules.

    memory: `MemoryConfig.published(...)` with the sizes of the caller's cache (local_frames, sink_frames), its
    record_interval and, to activate only some of the remembered frames, top_k. Its defaults where not given.
    returns: makes the return value of a self-attention from a `PatchedCall`, for models whose blocks expect more than
    the output [B, L, C].

    The caller's "k" and "v" buffers become the pool: nothing is copied. A pass of the model stores what it wrote unless
    the caller passes `update_cache=False` to it (or that is the default of its `forward`).
    Raises ValueError, naming the module and the attribute, for what cannot be served, here or in a call.
    """
    memory = MemoryConfig.published() if memory is None else memory
    if not isinstance(memory, MemoryConfig) or memory.published is None:
        raise ValueError(
            "memory: a patched model keeps the memory that its own code maintains, so it must be a "
            f"MemoryConfig.published(...), got {memory!r}"
        )
    if any(isinstance(getattr(module, "_memflow_patch", None), Patch) for module in model.modules()):
        raise ValueError("model: is patched already; unpatch(model) first")
    found = self_attentions(model)
    if not found:
        raise ValueError(
            f"model: {type(model).__name__} has no self-attention of the causal Wan kind, a module with "
            f"{', '.join(ATTRIBUTES)} whose forward takes {', '.join(PARAMETERS)}"
        )
    for name, module in found.items():
        check_module(name, module, ATTRIBUTES)
    mode, sizes = StoreMode(model, set(found.values())), GridSizes()
    for name, module in found.items():
        inputs = Inputs(name, inspect.signature(module.forward), memory, sizes)
        module._memflow_patch = Patch(module, inputs, CallerAttention(module, name, memory), returns, mode)
    model._memflow_store_mode = mode
    return list(found)


def unpatch(model: nn.Module) -> None:
    """Give every patched self-attention its own code back, and every cache that it used the order this code expects."""
    for module in model.modules():
        installed = getattr(module, "_memflow_patch", None)
        if isinstance(installed, Patch):
            installed.remove()
            del module._memflow_patch
    mode = getattr(model, "_memflow_store_mode", None)
    if mode is not None:
        mode.remove()
        del model._memflow_store_mode


def self_attentions(model: nn.Module) -> dict[str, nn.Module]:
    """The modules whose forward is that of a causal Wan self-attention, by name."""
    return {
        name or type(module).__name__: module
        for name, module in model.named_modules()
        if set(PARAMETERS) <= set(_signature(module).parameters) and hasattr(module, "num_heads")
    }


def _signature(module: nn.Module) -> inspect.Signature:
    """Of its forward; without parameters where there is none to be had, as of builtins and scripted modules."""
    try:
        return inspect.signature(module.forward)
    except ValueError:
        return inspect.Signature()


class Patch:
    """One self-attention with our forward in place of its own."""

    def __init__(
        self, module: nn.Module, inputs: Inputs, attention: CallerAttention, returns: Returns | None, mode: StoreMode
    ):
        self.module, self.inputs, self.attention, self.returns, self.mode = module, inputs, attention, returns, mode
        self.own = module.__dict__.get("forward")  # set on the object by offloading hooks, for example
        # Weakly: a video's buffers belong to the caller and go when the caller drops them.
        self.buffers: WeakIdKeyDictionary = WeakIdKeyDictionary()
        module.forward = self.forward

    @torch.compiler.disable
    def forward(self, *args, **kwargs):
        call = self.inputs.read(self.module, args, kwargs)
        stored = self.mode.stores if call.update_cache is None else call.update_cache
        self.buffers[call.kv_cache["k"]] = weakref.ref(call.kv_cache["v"])
        output, cache = self.attention(
            call.x, call.grid, call.start, call.kv_cache, call.kv_bank, call.update_bank, call.is_recache, stored
        )
        if self.returns is None:
            return output
        ends = cache.global_end.read(call.kv_cache), cache.local_end.read(call.kv_cache)
        return self.returns(PatchedCall(output, call.kv_cache, stored, *ends))

    def remove(self) -> None:
        if self.own is None:
            del self.module.forward
        else:
            self.module.forward = self.own
        for key, value in self.buffers.items():
            if value() is not None:
                put_in_order(key, value())


class StoreMode:
    """Whether the pass in progress stores what it writes: the `update_cache` of the modules around the attention.

    The innermost module that is given one decides. Where none has such a parameter every pass stores.
    """

    def __init__(self, model: nn.Module, attentions: set[nn.Module]):
        self.stores = True
        self.hooks = [model.register_forward_pre_hook(self._begin, prepend=True)]
        for module in model.modules():
            if module in attentions or not any(part in attentions for part in module.modules()):
                continue
            signature = _signature(module)
            kinds = {parameter.kind for parameter in signature.parameters.values()}
            if "update_cache" in signature.parameters or inspect.Parameter.VAR_KEYWORD in kinds:
                hook = partial(self._read, signature)
                self.hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _begin(self, module, args) -> None:
        self.stores = True

    def _read(self, signature: inspect.Signature, module, args, kwargs) -> None:
        if "update_cache" in signature.parameters:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            self.stores = bool(bound.arguments["update_cache"])
        elif "update_cache" in kwargs:
            self.stores = bool(kwargs["update_cache"])

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()

"""`patch(model)`: our attention in place of a causal Wan self-attention, over the cache that the caller keeps.

The contract of the calls is described in docs/integrations.md; it follows the published system's description.
"""

from __future__ import annotations

import inspect
import weakref
from functools import partial
from numbers import Integral, Real

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from memflow.integrations.attention import CallerAttention
from memflow.integrations.bank import BankUpdate, bank_updates
from memflow.integrations.cache import put_in_order
from memflow.integrations.caller import PatchedCall, Returns, plain, recognised
from memflow.integrations.checks import GridSizes, Inputs, check_module
from memflow.integrations.selfcheck import SelfCheck
from memflow.integrations.settings import ModuleSettings
from memflow.memory.config import MemoryConfig

ATTRIBUTES = ("q", "k", "v", "o", "norm_q", "norm_k", "num_heads")
PARAMETERS = ("x", "grid_sizes", "kv_cache", "current_start")


def patch(
    model: nn.Module,
    *,
    memory: MemoryConfig | None = None,
    returns: Returns | None = None,
    retrieval: bool = False,
    check: bool = True,
    check_calls: int = 2,
    check_tolerance: float | None = None,
) -> list[str]:
    """Replace every self-attention of the causal Wan kind in `model` by ours, over the cache that the caller keeps.

    The caller's "k" and "v" buffers become the pool: nothing is copied. Sizes are read from the modules (`sink_size`,
    `local_attn_size`, `max_attention_size`, `record_interval`, `SMA`) and from the buffers. A pass of the model stores
    what it wrote unless the caller passes `update_cache=False` to it (or that is the default of its `forward`).

    With `check`, calls of a kind that has not been seen before (an empty cache, a full one, a prompt switch, ...) run
    the module's own code on a copy of the cache beside ours, and both must agree: outputs, what is written, indices.
    Such a call takes as long as both together and, while it runs, memory for two copies of one layer's cache; every
    layer keeps a copy of the frames that a chunk overwrites until the chunk is stored. Calls of kinds that have been
    checked pay a look-up, no copy. A CUDA graph can be captured when the calls in it have been checked.

    Args:
        model: the generator, or any module around its self-attentions.
        memory: `MemoryConfig.published(...)`, for what modules do not say; it must agree with what they do say.
        returns: makes the return value of a self-attention from a `PatchedCall`, where it is none of the kinds that are
            recognised: the output, or (output, (global end, local end, deferred update)).
        retrieval: also replace the model's own update of its bank (`_apply_cache_updates_before`) by ours: the same
            frames, in a fraction of the time.
        check: run the self-check. Without it, what two forks do differently under the same names is not noticed.
        check_calls: how many calls of every kind are checked in every layer.
        check_tolerance: the greatest relative difference (Frobenius norm). None: 1e-4 where a CPU computes in float32
            or float64, 1e-2 elsewhere.

    Returns:
        The names of the patched modules.

    Raises:
        ValueError: naming the module and the attribute or argument, for what cannot be served, here or in a call.

    Example:
        >>> patch(generator.model)  # doctest: +SKIP
        ['blocks.0.self_attn', 'blocks.1.self_attn']
    """
    if memory is not None and (not isinstance(memory, MemoryConfig) or memory.published_mode is None):
        raise ValueError(
            "memory: a patched model keeps the memory that its own code maintains, so it must be a "
            f"MemoryConfig.published(...), got {memory!r}"
        )
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: must be a torch.nn.Module, got {type(model).__name__}")
    _check_options(check, check_calls, check_tolerance)
    if returns is not None and not callable(returns):
        raise ValueError(f"returns: must be a function of a PatchedCall, got {returns!r}")
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
    banks = bank_updates(model) if retrieval else {}
    owners = _owners(model, found)
    mode, sizes = StoreMode(model, set(found.values())), GridSizes()
    for name, module in found.items():
        settings = ModuleSettings(name, module, memory, owners[name], check)
        inputs = Inputs(name, module.forward, memory, sizes, check)
        checking = SelfCheck(name, module, module.forward, check_calls if check else 0, check_tolerance)
        module._memflow_patch = Patch(module, inputs, settings, checking, returns, mode)
    for name, module in banks.items():
        BankUpdate(name, module, check_calls if check else 0)
    model._memflow_store_mode = mode
    return list(found)


def unpatch(model: nn.Module) -> None:
    """Give every patched self-attention its own code back, and every cache that it used the order this code expects."""
    for module in model.modules():
        installed = getattr(module, "_memflow_patch", None)
        if isinstance(installed, Patch):
            installed.remove()
            del module._memflow_patch
        updated = getattr(module, "_memflow_bank_update", None)
        if isinstance(updated, BankUpdate):
            updated.remove()
    # It is on what was given to patch(): this model or a part of it.
    for module in model.modules():
        mode = vars(module).get("_memflow_store_mode")
        if mode is not None:
            mode.remove()
            del module._memflow_store_mode


def self_attentions(model: nn.Module) -> dict[str, nn.Module]:
    """The modules whose forward is that of a causal Wan self-attention, by name. Blocks around them have the same
    parameters, which they pass on: only the innermost count."""
    alike = {
        name or type(module).__name__: module
        for name, module in model.named_modules()
        if set(PARAMETERS) <= set(_signature(module).parameters) and hasattr(module, "num_heads")
    }
    within = {id(module) for module in alike.values()}
    return {
        name: module
        for name, module in alike.items()
        if not any(id(part) in within for part in module.modules() if part is not module)
    }


def _owners(model: nn.Module, found: dict[str, nn.Module]) -> dict[str, nn.Module | None]:
    """For every self-attention the innermost module around it that says how many frames make a chunk."""
    around = [module for module in model.modules() if hasattr(module, "num_frame_per_block")]
    inside = [(module, {id(part) for part in module.modules()}) for module in around]
    return {
        name: next((owner for owner, parts in reversed(inside) if id(module) in parts), None)
        for name, module in found.items()
    }


def _check_options(check: bool, check_calls: int, check_tolerance: float | None) -> None:
    if not isinstance(check, bool):
        raise ValueError(f"check must be True or False, got {check!r}")
    if isinstance(check_calls, bool) or not isinstance(check_calls, Integral) or check_calls < 1:
        raise ValueError(f"check_calls must be a whole number of at least 1, got {check_calls!r}")
    number = isinstance(check_tolerance, Real) and not isinstance(check_tolerance, bool)
    if check_tolerance is not None and not (number and 0 < check_tolerance < 1):
        raise ValueError(f"check_tolerance must be between 0 and 1, got {check_tolerance!r}")


def _signature(module: nn.Module) -> inspect.Signature:
    """Of its forward; without parameters where there is none to be had, as of builtins and scripted modules."""
    try:
        return inspect.signature(module.forward)
    except ValueError:
        return inspect.Signature()


class Patch:
    """One self-attention with our forward in place of its own."""

    def __init__(
        self,
        module: nn.Module,
        inputs: Inputs,
        settings: ModuleSettings,
        check: SelfCheck,
        returns: Returns | None,
        mode: StoreMode,
    ):
        self.module, self.inputs, self.settings, self.check = module, inputs, settings, check
        self.returns, self.mode = returns, mode
        self.attention = CallerAttention(module, inputs.name)
        self.own = module.__dict__.get("forward")  # set on the object by offloading hooks, for example
        # Weakly: a video's buffers belong to the caller and go when the caller drops them.
        self.buffers: WeakIdKeyDictionary = WeakIdKeyDictionary()
        module.forward = self.forward

    def forward(self, *args, **kwargs):
        # Marking the whole of it as not to be compiled would cost every call as much as a small matrix product.
        if torch.compiler.is_compiling():
            return self._outside_graphs(*args, **kwargs)
        return self._forward(*args, **kwargs)

    @torch.compiler.disable
    def _outside_graphs(self, *args, **kwargs):
        return self._forward(*args, **kwargs)

    def _forward(self, *args, **kwargs):
        call = self.inputs.read(self.module, args, kwargs)
        settings = self.settings.read(call.has_indices, call.kv_bank is not None)
        stored = self.mode.stores if call.update_cache is None else call.update_cache
        planned = self.attention.plan(call, settings, stored, self.returns is not plain)
        user = planned.cache.user
        if user is None or user() is not self:
            planned.cache.user = weakref.ref(self)
            self.buffers[call.kv_cache["k"]] = weakref.ref(call.kv_cache["v"])
        kind = self.check.due(planned)
        expected = self.check.run_own(planned) if kind is not None or self.returns is None else None
        if self.returns is None:
            self.returns = recognised(self.inputs.name, expected.result)
            planned = self.attention.plan(call, settings, stored, self.returns is not plain)
        if kind is None or expected is None:
            output = self.attention.run(planned)
        else:
            output = self.check.compare(planned, kind, expected, self.attention)
        if self.returns is plain:
            return output
        return self.returns(PatchedCall(output, call.kv_cache, stored, *planned.cache.ends()))

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
                hook = partial(self._read, tuple(signature.parameters.values()))
                self.hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _begin(self, module, args) -> None:
        self.stores = True

    def _read(self, parameters: tuple[inspect.Parameter, ...], module, args, kwargs) -> None:
        """parameters: of the module's forward, which says itself what is wrong with its arguments."""
        if "update_cache" in kwargs:
            self.stores = bool(kwargs["update_cache"])
            return
        for index, parameter in enumerate(parameters):
            if parameter.name == "update_cache":
                given = args[index] if index < len(args) else parameter.default
                self.stores = given is not parameter.empty and bool(given)

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()

"""What of a transformer may change while a stream runs on it: looked at once per chunk, on the host.

Adapters come and go, weights are fused, quantised or moved, hooks are set. What was computed of the weights, the
prompt's keys and values, is then made anew; what a stream cannot live with is refused by name.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator

from torch import nn

from memflow.errors import MemFlowError
from memflow.models.base import sampled

# Hooks of diffusers that call what they are set on; the last two are set by `memflow.models.wan.attention.share`.
_HARMLESS = {"layerwise_casting", "peft_autocast_disable", "cp_input---blocks.0", "cp_output---proj_out"}
FETCHED = (
    "transformer: its weights are fetched layer by layer (sequential offloading), which a stream cannot use: "
    "its processors read them directly; enable_model_cpu_offload moves whole models and works"
)


def refuse_hooks(transformer: nn.Module) -> None:
    """MemFlowError where a hook of diffusers may skip, repeat or move a part of the transformer.

    A call that is skipped writes no keys: the memory would hold an older chunk's, and nothing would be said.

    Args:
        transformer: a WanTransformer3DModel.
    """
    # Read from the modules' dictionaries: nn.Module is slow to say that an attribute is missing.
    for module in [module for module in _modules(transformer) if "_diffusers_hook" in module.__dict__]:
        names = set(module._diffusers_hook.hooks)
        if any("group_offloading" in name or name == "layer_execution_tracker" for name in names):
            raise MemFlowError(
                "transformer: group offloading moves its layers one by one, which a stream cannot use: its processors "
                "read their weights directly; enable_model_cpu_offload moves whole models and works"
            )
        if names - _HARMLESS:
            raise MemFlowError(
                f"transformer: a stream cannot use the hook {sorted(names - _HARMLESS)[0]!r} on its "
                f"{type(module).__name__}: calls that a cache skips write nothing into the memory; "
                "transformer.disable_cache() first"
            )


def text_version(transformer: nn.Module) -> Hashable:
    """Changes with whatever turns a prompt's embeddings into keys and values: weights, adapters, dtypes, fused layers.

    Some numbers of every weight are compared too, as `sampled` says why.

    Args:
        transformer: a WanTransformer3DModel.
    """
    parts, weights = [], []
    for root in _text_modules(transformer):
        for module in _modules(root) if root._modules else (root,):
            own = module.__dict__
            parts.append(id(module))
            if "scaling" in own:  # a layer with peft's adapters
                parts += [repr(own["scaling"]), repr(module.active_adapters), module.disable_adapters]
            for tensor in own["_parameters"].values():
                if tensor is not None:
                    parts += [id(tensor), tensor.dtype, 0 if tensor.is_inference() else tensor._version]
                    if tensor.ndim > 1:
                        plain = getattr(tensor, "qdata", tensor)  # torchao's
                        if plain.is_meta:
                            raise MemFlowError(FETCHED)
                        weights.append(plain)
    return *parts, *sampled(weights)


def adapters(transformer: nn.Module) -> dict[str, list]:
    """Of every layer with peft's adapters, by name: their scales, which are active, and whether they are switched off.

    Args:
        transformer: a WanTransformer3DModel.
    """
    return {
        name: [
            {adapter: float(scale) for adapter, scale in layer.scaling.items()},
            layer.active_adapters,
            layer.disable_adapters,
        ]
        for name, layer in transformer.named_modules()
        if "scaling" in vars(layer)
    }


def layout(transformer: nn.Module) -> Hashable:
    """Changes with which layers a call runs and where their weights lie: what a captured CUDA graph fixes.

    Args:
        transformer: a WanTransformer3DModel.
    """
    parts = []
    for module in _modules(transformer):
        own = module.__dict__
        parts.append(id(module))
        if "scaling" in own:
            parts += [repr(own["scaling"]), repr(module.active_adapters), module.disable_adapters]
        parts += [getattr(x, "qdata", x).data_ptr() for x in own["_parameters"].values() if x is not None]
    return tuple(parts)


def _text_modules(transformer: nn.Module) -> Iterator[nn.Module]:
    yield transformer.condition_embedder.text_embedder
    for block in transformer.blocks:
        attn = block._modules["attn2"]
        names = ("to_kv", "norm_k") if attn.__dict__.get("fused_projections") else ("to_k", "to_v", "norm_k")
        yield from map(attn._modules.get, names)


def _modules(root: nn.Module) -> list[nn.Module]:
    """As root.modules(), in another order; a third of the time."""
    found = level = [root]
    while level:
        level = [child for module in level for child in module._modules.values() if child is not None]
        found = found + level
    return found

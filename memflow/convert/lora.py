"""Low-rank adapters of the original transformers: read, merged into the weights, or written for diffusers and peft."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from memflow.errors import MemFlowError
from memflow.models.wan.originals import Checkpoint, listed

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"  # where diffusers' load_lora_weights(folder) looks
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<factor>A|B|down|up)(?:\.default)?\.weight")
_DOWN = {"A": "A", "down": "A", "B": "B", "up": "B"}


class Update(NamedTuple):
    """W + scale * B @ A. A: [rank, in], B: [out, rank]."""

    a: Tensor
    b: Tensor
    scale: float

    def added_to(self, rows: Tensor, start: int) -> Tensor:
        """Rows `start`... of a weight with their part of the update, [n, in] float32."""
        b = self.b[start : start + len(rows)].float()
        return rows.float().addmm(b, self.a.float(), alpha=self.scale)


class Lora(NamedTuple):
    """Updates by the original name of the weight that each belongs to. assumed_alpha: no file said alpha."""

    path: Path
    updates: dict[str, Update]
    assumed_alpha: bool


def read_lora(checkpoint: Checkpoint, alpha: float | None = None) -> Lora:
    """The adapter in a file with names like `blocks.0.self_attn.q.lora_A.weight`, of any rank.

    The scale is alpha / rank. alpha: given; else per module where the file holds `<module>.alpha`; else `lora_alpha`
    of an adapter_config.json beside the file; else the rank (a scale of 1), as diffusers assumes too.
    """
    source, factors, alphas, others = checkpoint.path.name, {}, {}, []
    for name, tensor in checkpoint.tensors.items():
        if match := _FACTOR.fullmatch(name):
            factors.setdefault(match["module"], {})[_DOWN[match["factor"]]] = tensor
        elif name.endswith(".alpha") and tensor.numel() == 1:
            alphas[name.removesuffix(".alpha")] = float(tensor)
        else:
            others.append(name)
    others += [f"{module}.alpha" for module in alphas if module not in factors]
    if others:
        raise MemFlowError(f"{source}: {len(others)} unexpected tensors: {listed(sorted(others))}")
    lonely = [f"{module}.lora_{'BA'['B' in pair]}" for module, pair in factors.items() if len(pair) < 2]
    if lonely:
        raise MemFlowError(f"{source}: {len(lonely)} missing tensors: {listed(lonely)}")
    config = _adapter_config(checkpoint.path)
    updates = {}
    for module, pair in factors.items():
        a, b = pair["A"], pair["B"]
        if a.ndim != 2 or b.ndim != 2 or b.shape[1] != a.shape[0]:
            raise MemFlowError(f"{source}: {module}: lora_A {list(a.shape)} and lora_B {list(b.shape)} do not fit")
        rank = a.shape[0]
        numerator = alpha or alphas.get(module) or config.get("lora_alpha") or rank
        updates[f"{module}.weight"] = Update(a, b, numerator / (math.sqrt(rank) if config.get("use_rslora") else rank))
    known = alpha is not None or config.get("lora_alpha") is not None or alphas.keys() == factors.keys()
    return Lora(checkpoint.path, updates, assumed_alpha=not known)


def check_fits(lora: Lora, weights: Mapping[str, Tensor]) -> None:
    """MemFlowError for updates of weights that the transformer does not have, or of other sizes, by name."""
    absent = sorted(lora.updates.keys() - weights.keys())
    if absent:
        raise MemFlowError(f"{lora.path.name}: the transformer has no weights of these names: {listed(absent)}")
    misshapen = [
        f"{name} {[update.b.shape[0], update.a.shape[1]]} (needs {list(weights[name].shape)})"
        for name, update in lora.updates.items()
        if weights[name].shape != (update.b.shape[0], update.a.shape[1])
    ]
    if misshapen:
        raise MemFlowError(f"{lora.path.name}: {len(misshapen)} misshapen updates: {listed(misshapen)}")


def write_lora(lora: Lora, original: Mapping[str, str], folder: Path) -> None:
    """Write `lora` so that `pipeline.load_lora_weights(folder)` reads it; the scales are multiplied into B, which is
    float32 then where the product would not fit its format without rounding.

    original: diffusers' names of the transformer's weights to the original ones.
    """
    names = {old: new for new, old in original.items()}
    tensors = {}
    for old, (a, b, scale) in lora.updates.items():
        module = names[old].removesuffix(".weight")
        tensors[f"transformer.{module}.lora_A.weight"] = a.contiguous()
        tensors[f"transformer.{module}.lora_B.weight"] = _scaled(b, scale).contiguous()
    partial = folder / f"{WEIGHTS_NAME}.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.replace(folder / WEIGHTS_NAME)


def _scaled(b: Tensor, scale: float) -> Tensor:
    exact = b.float() * scale
    kept = exact.to(b.dtype)
    return kept if torch.equal(kept.float(), exact) else exact


def _adapter_config(path: Path) -> dict:
    """What peft wrote beside its weights, or nothing."""
    config = path.parent / "adapter_config.json"
    if not config.is_file():
        return {}
    try:
        content = json.loads(config.read_text())
    except (OSError, ValueError) as error:
        raise MemFlowError(f"{config}: cannot be read: {error}") from error
    for name in ("alpha_pattern", "rank_pattern"):
        if content.get(name):
            raise MemFlowError(f"{config}: {name} is not known here, every module must have the same: {content[name]}")
    return content

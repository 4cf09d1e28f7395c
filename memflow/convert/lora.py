"""Low-rank adapters of the original transformers: read, merged into the weights, or written for diffusers and peft."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE as WEIGHTS_NAME  # where load_lora_weights looks
from safetensors.torch import save
from torch import Tensor

from memflow.errors import MemFlowError
from memflow.files import write_whole
from memflow.models.wan.checkpoints import Checkpoint, listed, read_object

_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<factor>A|B|down|up)(?:\.default)?\.weight")
# Of peft: the others change the base model as well.
_INITS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
_DOWN = {"A": "A", "down": "A", "B": "B", "up": "B"}


class Update(NamedTuple):
    """W + scale * B @ A, for a weight W [out, in]."""

    a: Tensor  # [rank, in]
    b: Tensor  # [out, rank]
    scale: float  # alpha / rank

    def added_to(self, rows: Tensor, start: int) -> Tensor:
        """Rows `start`... of a weight with their part of the update, [n, in] float32."""
        b = self.b[start : start + len(rows)].float()
        return rows.float().addmm(b, self.a.float(), alpha=self.scale)


class Lora(NamedTuple):
    """A low-rank adapter."""

    path: Path
    updates: dict[str, Update]  # by the original name of the weight that each belongs to
    assumed_alpha: bool  # nobody said alpha


def read_lora(checkpoint: Checkpoint, alpha: float | None = None, published: tuple[int, float] | None = None) -> Lora:
    """The adapter in a file with names like `blocks.0.self_attn.q.lora_A.weight`. Its scale is alpha / rank.

    Args:
        checkpoint: The file.
        alpha: None = per module where the file holds `<module>.alpha`; else `lora_alpha` of an adapter_config.json
            beside the file; else that of `published`; else the rank (a scale of 1), as diffusers assumes too.
        published: rank and alpha of the preset's own adapter; alpha counts for modules of that rank.

    Raises:
        MemFlowError: Tensors are missing, unexpected or do not fit each other, by name; or alpha is no number.
    """
    source, factors, alphas, others = checkpoint.path.name, {}, {}, []
    for name, tensor in checkpoint.tensors.items():
        if match := _FACTOR.fullmatch(name):
            factors.setdefault(match["module"], {})[_DOWN[match["factor"]]] = tensor
        elif name.endswith(".alpha") and tensor.numel() == 1 and not tensor.is_complex():
            alphas[name.removesuffix(".alpha")] = float(tensor)
        else:
            others.append(name)
    others += [f"{module}.alpha" for module in alphas if module not in factors]
    if others:
        raise MemFlowError(f"{source}: {len(others)} unexpected tensors: {listed(sorted(others))}")
    unpaired = [f"{module}.lora_{'BA'['B' in pair]}" for module, pair in factors.items() if len(pair) < 2]
    if unpaired:
        raise MemFlowError(f"{source}: {len(unpaired)} missing tensors: {listed(unpaired)}")
    config = _adapter_config(checkpoint.path)
    updates, assumed = {}, 0
    for module, pair in factors.items():
        a, b = pair["A"], pair["B"]
        if a.ndim != 2 or b.ndim != 2 or b.shape[1] != a.shape[0] or not a.shape[0]:
            raise MemFlowError(f"{source}: {module}: lora_A {list(a.shape)} and lora_B {list(b.shape)} do not fit")
        for factor, numbers in pair.items():
            if not torch.isfinite(numbers).all():
                raise MemFlowError(f"{source}: {module}.lora_{factor} holds NaN or infinity")
        rank = a.shape[0]
        recorded = published[1] if published is not None and published[0] == rank else None
        stated = (alpha, alphas.get(module), config.get("lora_alpha"), recorded, rank)
        assumed += all(value is None for value in stated[:-1])
        numerator = next(value for value in stated if value is not None)
        if not isinstance(numerator, int | float) or not math.isfinite(numerator):
            raise MemFlowError(f"{source}: {module}: alpha must be a number, got {numerator!r}")
        updates[f"{module}.weight"] = Update(a, b, numerator / (math.sqrt(rank) if config.get("use_rslora") else rank))
    return Lora(checkpoint.path, updates, assumed_alpha=assumed > 0)


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
    """Write an adapter so that `pipeline.load_lora_weights(folder)` reads it.

    Args:
        lora: The adapter. Its scales are multiplied into B, which is float32 then where the product would not fit its
            format without rounding.
        original: diffusers' names of the transformer's weights to the original ones.
        folder: Where to write.
    """
    names = {old: new for new, old in original.items()}
    tensors = {}
    for old, (a, b, scale) in lora.updates.items():
        module = names[old].removesuffix(".weight")
        tensors[f"transformer.{module}.lora_A.weight"] = a.contiguous()
        tensors[f"transformer.{module}.lora_B.weight"] = _scaled(b, scale).contiguous()
    write_whole(folder / WEIGHTS_NAME, lambda file: file.write(save(tensors, metadata={"format": "pt"})))


def _scaled(b: Tensor, scale: float) -> Tensor:
    exact = b.float() * scale
    kept = exact.to(b.dtype)
    return kept if torch.equal(kept.float(), exact) else exact


def _adapter_config(path: Path) -> dict:
    """What peft wrote beside its weights, or nothing."""
    config = path.parent / "adapter_config.json"
    if not config.is_file():
        return {}
    content = read_object(config, 2**20)
    for name in ("alpha_pattern", "rank_pattern"):
        if content.get(name):
            raise MemFlowError(f"{config}: {name} is not known here, every module must have the same: {content[name]}")
    if (began := content.get("init_lora_weights")) not in _INITS:
        raise MemFlowError(f"{config}: init_lora_weights {began!r:.40}: is for a base model that was changed with it")
    return content

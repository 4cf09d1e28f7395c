"""Linear layers in float8, through torchao: weights are stored so, a scale per row; inputs are rounded as they come."""

from __future__ import annotations

import re
from importlib.util import find_spec

import torch
from diffusers import WanTransformer3DModel
from torch import nn

from memflow.errors import MemFlowError, install_command

# What every pass computes. The text's keys and values are computed once per prompt, embeddings and head once per pass:
# they stay as they are.
_LINEARS = re.compile(
    r"blocks\.\d+\.(attn1\.(to_q|to_k|to_v|to_qkv)|attn2\.to_q|attn[12]\.to_out\.0|ffn\.net\.(0\.proj|2))"
)
_MULTIPLE = 16  # of both sizes of a weight, for the float8 product


def float8_linears(transformer: WanTransformer3DModel) -> list[str]:
    """Names of the linear layers that `to_float8` converts; works on the meta device too."""
    fused = [n for n, block in enumerate(transformer.blocks) if getattr(block.attn1, "fused_projections", False)]
    unused = {f"blocks.{index}.attn1.to_{x}" for index in fused for x in "qkv"}
    return [
        name
        for name, module in transformer.named_modules()
        if _LINEARS.fullmatch(name)
        and name not in unused
        and isinstance(module, nn.Linear)
        and module.in_features % _MULTIPLE == module.out_features % _MULTIPLE == 0
    ]


def to_float8(transformer: WanTransformer3DModel) -> list[str]:
    """Convert the weights in place; returns the names of the layers. Needs a GPU of compute capability 8.9, bfloat16
    weights and torchao (the extra `float8`). Raises MemFlowError, with the reason, where it cannot be done."""
    reason = _refusal(transformer)
    if reason is not None:
        raise MemFlowError(f"float8: {reason}")
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    names = float8_linears(transformer)
    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
    quantize_(transformer, config, filter_fn=lambda module, name: name in names)
    return names


def _refusal(transformer: WanTransformer3DModel) -> str | None:
    if any("lora_" in name for name, _ in transformer.named_parameters()):
        return "this model has LoRA layers; merge them into the weights first (fuse_lora, unload_lora_weights)"
    linears = [transformer.get_submodule(name) for name in float8_linears(transformer)]
    if not linears:
        return f"this model has no linear layer of its blocks whose sizes are multiples of {_MULTIPLE}"
    dtypes = {linear.weight.dtype for linear in linears}
    if dtypes != {torch.bfloat16}:
        return f"the weights must be bfloat16, got {', '.join(sorted(str(dtype) for dtype in dtypes))}"
    if transformer.device.type != "cuda":
        return f"the model must be on a GPU, it is on {transformer.device}"
    if torch.version.hip is None and torch.cuda.get_device_capability(transformer.device) < (8, 9):
        return f"{torch.cuda.get_device_name(transformer.device)} has no float8 arithmetic (compute capability 8.9)"
    if find_spec("torchao") is None:
        return f"torchao is not installed: {install_command('float8')}"
    return None

"""Dense attention by the fused kernels that torch brings along, for the calls that the configuration gives to them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.attend import attend

aten = torch.ops.aten


def serves(kernel: str, query: Tensor) -> bool:
    """Whether torch's `kernel`, "cudnn" or "flash", takes this format and head size. On the CPU there is only one."""
    if query.device.type == "cpu":
        return True
    largest = {"cudnn": 128, "flash": 256}[kernel]
    return query.dtype in (torch.bfloat16, torch.float16) and query.shape[3] % 8 == 0 and query.shape[3] <= largest


def attend_dense(kernel: str, query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """query [B, Lq, H, D], key and value [B, Lk, H, D] -> out [B, Lq, H, D], lse [B, H, Lq], contiguous."""
    if query.device.type == "cpu":
        out, lse = attend(query, key, value, scale)
        return out.contiguous(), lse.contiguous()
    heads_first = [x.transpose(1, 2) for x in (query, key, value)]
    if kernel == "cudnn":
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(*heads_first, None, True, scale=scale)
    else:
        out, lse, *_ = aten._scaled_dot_product_flash_attention(*heads_first, scale=scale)
    batch, queries, heads, _ = query.shape
    lse = lse.reshape(batch, heads, -1)[..., :queries]  # cuDNN's has a last dimension of 1, an older flash's is padded
    return out.transpose(1, 2).contiguous(), lse.contiguous()

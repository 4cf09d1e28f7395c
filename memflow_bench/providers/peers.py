"""Dense attention kernels of others. With activation: what each head chose is gathered next to the window first."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..states import AttentionState
from ..workloads.training import BlockCausalState, TrainingState, block_causal_mask
from .base import Provider, needs_gpu, needs_half, not_installed
from .gather import keys_and_values
from .steps import Attend, backward, step

SDPA = {  # name -> (backend, needs a GPU, needs half precision on a GPU)
    "flash": (SDPBackend.FLASH_ATTENTION, False, True),
    "cudnn": (SDPBackend.CUDNN_ATTENTION, True, True),
    "efficient": (SDPBackend.EFFICIENT_ATTENTION, True, False),
    "math": (SDPBackend.MATH, False, False),
}
FLASH_ATTENTION = {2: "flash_attn", 3: "flash_attn_interface", 4: "flash_attn.cute"}  # version -> module


class Sdpa(Provider):
    """torch's scaled_dot_product_attention, held to one of its backends."""

    def __init__(self, backend: str):
        self.name = f"SDPA {backend}"
        self.backend, self.gpu, self.half = SDPA[backend]

    def missing(self, device, dtype):
        if self.gpu and needs_gpu(device):
            return needs_gpu(device)
        return needs_half(dtype) if self.half and device.type == "cuda" else None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        states = (x.transpose(1, 2) for x in (query, key, value))
        with sdpa_kernel(self.backend):
            return F.scaled_dot_product_attention(*states, attn_mask=mask).transpose(1, 2)

    def attention(self, state: AttentionState):
        return lambda: self.attend(state.query, *keys_and_values(state))

    def training(self, state: TrainingState):
        return step(self._chosen(state.call), state.call.query, state.call.key, state.call.value, state.upstream)

    def backward(self, state: TrainingState):
        return backward(self._chosen(state.call), state.call.query, state.call.key, state.call.value, state.upstream)

    def _chosen(self, call: AttentionState) -> Attend:
        """What the heads chose is gathered, and its gradient scattered back by autograd."""

        def attend(query, key, value):
            return self.attend(query, *keys_and_values(call._replace(query=query, key=key, value=value)))

        return attend

    def block_causal(self, state: BlockCausalState):
        mask = block_causal_mask(state.case, state.query.device)
        return lambda: self.attend(state.query, state.key, state.value, mask)

    def block_causal_step(self, state: BlockCausalState):
        attend = functools.partial(self.attend, mask=block_causal_mask(state.case, state.query.device))
        return step(attend, state.query, state.key, state.value, state.upstream)


class FlashAttention(Provider):
    """The flash-attn packages, versions 2 to 4."""

    def __init__(self, version: int):
        self.name, self.module = f"flash-attn {version}", FLASH_ATTENTION[version]

    def missing(self, device, dtype):
        return needs_gpu(device) or needs_half(dtype) or not_installed(self.module)

    def attention(self, state: AttentionState):
        attend = importlib.import_module(self.module).flash_attn_func

        def run() -> Tensor:
            out = attend(state.query, *keys_and_values(state), causal=False)
            return out[0] if isinstance(out, tuple) else out

        return run


class FlashInfer(Provider):
    """FlashInfer's prefill kernel, one call per batch row."""

    name = "FlashInfer"

    def missing(self, device, dtype):
        return needs_gpu(device) or needs_half(dtype) or not_installed("flashinfer")

    def attention(self, state: AttentionState):
        attend = importlib.import_module("flashinfer").single_prefill_with_kv_cache

        def run() -> Tensor:
            rows = zip(state.query, *keys_and_values(state), strict=True)
            return torch.stack([attend(query, key, value, causal=False) for query, key, value in rows])

        return run


def flashinfer_norm_rope(
    qkv: Tensor, weight_q: Tensor, weight_k: Tensor, eps: float, grid: tuple[int, int, int], heads: int
) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
    """FlashInfer's norm and rotation of video transformers; frames count from 0, and there is no pool to write to.

    qkv [B, L, 3*H*D] bfloat16, as one linear layer for all three leaves them; grid: frames, rows and columns. The call
    returns query, key and value. Source: docs.flashinfer.ai, flashinfer.norm.fused_qk_rmsnorm_rope.
    """
    fused = importlib.import_module("flashinfer.norm").fused_qk_rmsnorm_rope
    head_dim = qkv.shape[-1] // (3 * heads)
    third = head_dim // 2 // 3
    options = {"num_frame_channels": head_dim - 4 * third, "num_height_channels": 2 * third}
    options |= {"num_width_channels": 2 * third, "head_dim": head_dim, "eps": eps}
    options |= dict(zip(("ppf", "pph", "ppw"), grid, strict=True))
    options |= {f"num_heads_{part}": heads for part in "qkv"}
    return lambda: fused(qkv, weight_q, weight_k, **options)

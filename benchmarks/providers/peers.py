"""Dense attention kernels of others. With activation: what each head chose is gathered next to the window first."""

from __future__ import annotations

import importlib
import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..states import AttentionState
from .base import Provider, needs_gpu, needs_half
from .gather import keys_and_values

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

    def attention(self, state: AttentionState):
        def run():
            key, value = keys_and_values(state)
            with sdpa_kernel(self.backend):
                query = state.query.transpose(1, 2)
                out = F.scaled_dot_product_attention(query, key.transpose(1, 2), value.transpose(1, 2))
            return out.transpose(1, 2)

        return run


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


def not_installed(module: str) -> str | None:
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # of the parent package
        found = None
    return None if found else f"the module {module} is not installed"

"""FlexAttention, by torch's Triton template or by FlashAttention-4's kernels.

With activation, a BlockMask per head, made from the choice in every call as a stream needs it.
"""

from __future__ import annotations

import shutil
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from ..states import AttentionState
from ..workloads.training import BlockCausalState
from .base import Provider, needs_gpu, needs_half, not_installed
from .gather import choose
from .steps import Attend, step

BLOCK = 128


class Flex(Provider):
    name = "FlexAttention"
    options: dict[str, str] = {}  # noqa: RUF012 (of the class, and never changed)

    def missing(self, device, dtype):
        if device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
            return "torch.compile needs a C++ compiler on the CPU"
        return None

    def attention(self, state: AttentionState):
        compiled = torch.compile(partial(flex_attention, kernel_options=self.options), dynamic=False)

        @torch.no_grad()
        def run() -> Tensor:
            mask = None if state.top_k is None else block_mask(state)
            states = (x.transpose(1, 2) for x in (state.query, state.key, state.value))
            return compiled(*states, block_mask=mask).transpose(1, 2)

        return run

    def block_causal(self, state: BlockCausalState):
        attend = _block_causal(state)
        return lambda: attend(state.query, state.key, state.value)

    def block_causal_step(self, state: BlockCausalState):
        return step(_block_causal(state), state.query, state.key, state.value, state.upstream)


def _block_causal(state: BlockCausalState) -> Attend:
    """Compiled, with a BlockMask that is made once, as a training loop has it."""
    compiled = torch.compile(flex_attention, dynamic=False)
    tokens, block = state.query.shape[1], state.case.chunk * state.case.tokens

    def visible(batch, head, query, key):
        return query // block >= key // block

    mask = create_block_mask(visible, None, None, tokens, tokens, device=state.query.device, BLOCK_SIZE=BLOCK)

    def attend(query, key, value):
        return compiled(*(x.transpose(1, 2) for x in (query, key, value)), block_mask=mask).transpose(1, 2)

    return attend


class FlexFlash(Flex):
    """FlexAttention with the kernels of the package flash-attn-4."""

    name = "FlexAttention FLASH"
    options = {"BACKEND": "FLASH"}  # noqa: RUF012

    def missing(self, device, dtype):
        return needs_gpu(device) or needs_half(dtype) or not_installed("flash_attn.cute")


def block_mask(state: AttentionState) -> BlockMask:
    """Blocks of keys that a head's chosen frames touch; frame borders inside a block are masked key by key."""
    case = state.case
    seen = torch.ones((case.batch, case.heads, case.frames), dtype=torch.bool, device=state.query.device)
    seen[..., : case.candidates] = False
    seen.scatter_(2, choose(state), True)

    def attended(batch, head, query, key):
        return seen[batch, head, key // case.tokens]

    sizes = (case.batch, case.heads, case.queries, case.frames * case.tokens)
    return create_block_mask(attended, *sizes, device=state.query.device, BLOCK_SIZE=BLOCK)

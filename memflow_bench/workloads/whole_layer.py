"""A whole self-attention layer: one pass without its linears, and a chunk with them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .. import counts, oracle
from ..states import EPS, LayerState, layer_state
from .base import Workload
from .operations import sampled

if TYPE_CHECKING:
    from diffusers.models.transformers.transformer_wan import WanAttention

PASSES = 4  # denoising passes of a chunk


class Layer(Workload):
    """One denoising pass of one layer between its linears: norm, rotation, write, activation, attention."""

    name = "layer"
    roundings = 4

    def make_state(self, seed):
        return layer_state(self.case, self.activated, self.dtype, self.device, seed)

    def changing(self, state):
        return [state.query, state.key, state.value]

    def expect(self):
        return [oracle.layer_rows(self.state)]

    def results(self, returned):
        return [sampled(returned, self.case.queries, self.dtype)]

    def flops(self):
        return counts.attention_flops(self.case, self.activated)


class ChunkState(NamedTuple):
    """attn: the layer with its linears. hidden: [B, Lq, H*D], its input. layer: the memory, and what the linears make
    of `hidden`."""

    attn: WanAttention
    hidden: Tensor
    layer: LayerState


class Chunk(Workload):
    """What a chunk costs one layer: update of the memory, 4 denoising passes, the clean pass; linears included. Runs
    return the output of the last pass [B, Lq, H*D]."""

    name = "chunk"
    roundings = 6  # the layer's, the last linear's and its input's

    @torch.no_grad()
    def make_state(self, seed):
        from diffusers.models.transformers.transformer_wan import WanAttention  # the ops are timed without it

        case = self.case
        layer = layer_state(case, self.activated, self.dtype, self.device, seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            attn = WanAttention(case.dim, case.heads, case.head_dim, EPS)
        attn.norm_q.weight.data = layer.weight_q.float().cpu()
        attn.norm_k.weight.data = layer.weight_k.float().cpu()
        attn = attn.to(self.device, self.dtype).requires_grad_(False)
        query, key, value = (linear(layer.query) for linear in (attn.to_q, attn.to_k, attn.to_v))
        return ChunkState(attn, layer.query, layer._replace(query=query, key=key, value=value))

    @torch.no_grad()
    def expect(self):
        linear = self.state.attn.to_out[0]
        attended = oracle.layer_rows(self.state.layer, updated=True).flatten(2)
        return [torch.nn.functional.linear(attended, linear.weight.double(), linear.bias.double())]

    def results(self, returned):
        return [sampled(returned, self.case.queries, self.dtype)]

    def flops(self):
        passes = PASSES + 1
        return passes * (counts.attention_flops(self.case, self.activated) + counts.linear_flops(self.case))

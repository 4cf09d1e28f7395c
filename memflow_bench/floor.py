"""What is left of a stream when parts of its memory attention take no time: no attention with them can be faster."""

from __future__ import annotations

import copy

import torch.nn.functional as F
from torch import Tensor

from memflow.memory import Pass
from memflow.models.wan.attention import MemorySelfAttention, install
from memflow.stream.pipeline import MemFlowPipeline


class ProjectionsOnly(MemorySelfAttention):
    """The linear layers of self-attention; norm, rotation, write and attention are left out."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb: Pass = None):
        query, _ = self.write(attn, hidden_states, rotary_emb)
        return attn.to_out[1](attn.to_out[0](query))

    def write(self, attn, hidden_states: Tensor, step: Pass) -> tuple[Tensor, None]:
        query, _, _ = (linear(hidden_states) for linear in (attn.to_q, attn.to_k, attn.to_v))
        return query, None


class AttentionOnly(ProjectionsOnly):
    """The linear layers and torch's attention over the frames that are seen; norm, rotation and write are left out."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb: Pass = None):
        query, _ = self.write(attn, hidden_states, rotary_emb)
        tokens = rotary_emb.grid[0] * rotary_emb.grid[1]
        seen = slice(rotary_emb.first_slot * tokens, rotary_emb.end_slot * tokens)
        key, value = (held[:, seen].transpose(1, 2) for held in self.pool[:2])
        out = F.scaled_dot_product_attention(query.unflatten(2, (attn.heads, -1)).transpose(1, 2), key, value)
        return attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))


def reduced(pipeline: MemFlowPipeline, processor: type[ProjectionsOnly]) -> MemFlowPipeline:
    """The same pipeline, weights shared, with `processor` in every layer. What it makes means nothing."""
    weights = pipeline.transformer
    twin = copy.copy(pipeline)
    twin.transformer = copy.deepcopy(weights, {id(p): p for p in (*weights.parameters(), *weights.buffers())})
    context = install(twin.transformer)
    for layer, block in enumerate(twin.transformer.blocks):
        replaced = context.processors.index(block.attn1.processor)
        context.processors[replaced] = processor(layer)
        block.attn1.set_processor(context.processors[replaced])
    return twin

"""What is left of a stream when its memory attention takes no time: no attention, ours or another, can be faster."""

from __future__ import annotations

import copy

from torch import Tensor

from memflow.memory import Pass
from memflow.pipeline import MemFlowPipeline
from memflow.processors import MemorySelfAttention, install


class ProjectionsOnly(MemorySelfAttention):
    """The linear layers of self-attention; norm, rotation, write and attention are left out."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb: Pass = None):
        query, _ = self.write(attn, hidden_states, rotary_emb)
        return attn.to_out[1](attn.to_out[0](query))

    def write(self, attn, hidden_states: Tensor, step: Pass) -> tuple[Tensor, None]:
        query, _, _ = (linear(hidden_states) for linear in (attn.to_q, attn.to_k, attn.to_v))
        return query, None


def without_memory_attention(pipeline: MemFlowPipeline) -> MemFlowPipeline:
    """The same pipeline, weights shared, with ProjectionsOnly in every layer. What it makes means nothing."""
    weights = pipeline.transformer
    twin = copy.copy(pipeline)
    twin.transformer = copy.deepcopy(weights, {id(p): p for p in (*weights.parameters(), *weights.buffers())})
    context = install(twin.transformer)
    for layer, block in enumerate(twin.transformer.blocks):
        replaced = context.processors.index(block.attn1.processor)
        context.processors[replaced] = ProjectionsOnly(layer)
        block.attn1.set_processor(context.processors[replaced])
    return twin

"""The published path as a provider."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..published_path.layer import activate
from ..states import EPS, AttentionState, LayerState, published_layer
from ..workloads.whole_layer import PASSES, ChunkState
from .base import Provider


class PublishedPath(Provider):
    name = "published path"

    def attention(self, state: AttentionState):
        """Cat, and with activation means, choice and gather, before dense attention."""
        edge, tokens = state.case.candidates * state.case.tokens, state.case.tokens

        def run():
            keys, values = state.key[:, :edge], state.value[:, :edge]
            if state.top_k is not None:
                keys, values = activate(state.query, keys, values, tokens, state.top_k)
            keys = torch.cat([keys, state.key[:, edge:]], dim=1)
            values = torch.cat([values, state.value[:, edge:]], dim=1)
            query = state.query.transpose(1, 2)
            return F.scaled_dot_product_attention(query, keys.transpose(1, 2), values.transpose(1, 2)).transpose(1, 2)

        return run

    def write(self, state: LayerState):
        """Norm, rotation, and the insertion into a copy of the cache."""
        layer, value = published_layer(state), state.value.unflatten(2, (state.case.heads, -1))

        def run():
            query, key = _norm_rotate(layer, state.query, state.key, state)
            layer.inserted(key, value, state.start_frame, store=False)
            return query, key

        return run

    def update(self, state: LayerState):
        layers = [published_layer(state) for _ in range(state.case.layers if state.key.is_cuda else 1)]

        def run():
            for layer in layers:
                layer.bank.maintain(state.text_key)
            return layers[0].bank.key.unflatten(1, (state.case.bank, -1))

        return run

    def layer(self, state: LayerState):
        layer = published_layer(state)
        return lambda: _attend(layer, state, state.query, state.key, state.value, store=False)

    def chunk(self, state: ChunkState):
        attn, layer_state = state.attn, state.layer
        layer = published_layer(layer_state)

        @torch.no_grad()
        def run():
            layer.bank.maintain(layer_state.text_key)
            for number in range(PASSES + 1):
                query, key, value = (linear(state.hidden) for linear in (attn.to_q, attn.to_k, attn.to_v))
                out = _attend(layer, layer_state, query, key, value, store=number == PASSES)
                out = attn.to_out[0](out.flatten(2))
            return out

        return run


def _norm_rotate(layer, query, key, state: LayerState):
    return layer.norm_rotate(query, key, state.weight_q, state.weight_k, EPS, state.start_frame)


def _attend(layer, state: LayerState, query, key, value, *, store: bool):
    query, key = _norm_rotate(layer, query, key, state)
    value = value.unflatten(2, (state.case.heads, -1))
    return layer.attend(query, key, value, start_frame=state.start_frame, store=store, top_k=state.top_k)

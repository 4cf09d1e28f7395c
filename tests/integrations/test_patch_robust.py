"""patch() and unpatch() where not everything is as it should be: odd modules around the attention, failed calls."""

from __future__ import annotations

import pytest
import torch
from causal_wan import TOKENS, Generator, StoringModel
from torch import nn

from memflow.integrations import patch, unpatch
from memflow.integrations.cache import FrameCache


def test_unpatching_after_a_call_that_failed(monkeypatch):
    def no_room(*_):
        raise torch.OutOfMemoryError("no room for the means")

    model = StoringModel().eval()
    patch(model)
    generator = Generator(model, places=None)
    monkeypatch.setattr(FrameCache, "__init__", no_room)
    with pytest.raises(torch.OutOfMemoryError):
        generator.chunk()
    unpatch(model)
    assert "forward" not in vars(model.blocks[0].self_attn)


def test_modules_without_a_signature_are_passed_over():
    class Opaque(nn.Module):
        def __init__(self, inner=None):
            super().__init__()
            self.inner = inner
            self.forward = max  # built in: inspect has no signature of it

    model = StoringModel().eval()
    model.head = Opaque()
    around = nn.ModuleList([Opaque(model)])
    assert patch(around) == ["0.inner.blocks.0.self_attn", "0.inner.blocks.1.self_attn"]
    unpatch(around)


@pytest.mark.parametrize("outer_first", [True, False])
def test_nothing_stays_whatever_part_is_unpatched(outer_first):
    model = StoringModel().eval()
    around = nn.ModuleDict({"model": model})
    patched, unpatched = (around, model) if outer_first else (model, around)
    patch(patched)
    unpatch(unpatched)
    unpatch(patched)
    for module in around.modules():
        assert not module._forward_pre_hooks and "_memflow_store_mode" not in vars(module)


def test_a_buffer_serves_a_video_of_another_size():
    key, value = torch.zeros(2, 1, 12 * TOKENS, 2, 4)
    cache = {"k": key, "v": value}
    first = FrameCache.of(cache, TOKENS, 0, True, 0)
    assert first.slots == 12 and FrameCache.of(cache, TOKENS, 0, True, 0) is first
    assert FrameCache.of(cache, TOKENS // 2, 0, True, 0).slots == 24

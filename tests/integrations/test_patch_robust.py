"""patch() and unpatch() where not everything is as it should be: odd modules around the attention, failed calls."""

from __future__ import annotations

import pytest
import torch
from causal_wan import Generator, StoringModel
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

"""An op goes through torch's dispatcher only where somebody listens there."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from memflow_kernels import frame_means, memory_attention
from memflow_kernels.ops import _call
from memflow_kernels.testing import states

KEY = states(2, 6, 3, 4)


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


class Marked(torch.Tensor):
    """A subclass that adds nothing."""


@pytest.fixture
def direct(monkeypatch):
    """Names of the ops that were called past the dispatcher."""
    names = []
    dispatch = _call.dispatch
    monkeypatch.setattr(_call, "dispatch", lambda name, device: names.append(name) or dispatch(name, device))
    return names


def test_plain_tensors_go_straight_to_the_backend(direct):
    frame_means(KEY, 2)
    with torch.no_grad():
        frame_means(torch.nn.Parameter(KEY), 2)
    assert direct == ["frame_means"] * 2


def test_a_mode_sees_the_op(direct):
    with Seen() as seen:
        frame_means(KEY, 2)
    assert "memflow.frame_means.default" in seen.names
    assert direct == []


def test_autograd_sees_the_op(direct):
    key = KEY.clone().requires_grad_()
    assert frame_means(key, 2).grad_fn is not None
    assert memory_attention(KEY, key, KEY, tokens_per_frame=2).grad_fn is not None
    assert direct == []


def test_subclasses_and_transforms_see_the_op(direct):
    frame_means(KEY.as_subclass(Marked), 2)
    with torch._subclasses.FakeTensorMode() as mode:
        assert frame_means(mode.from_tensor(KEY), 2).shape == (2, 3, 3, 4)
    exported = torch.export.export(Means(), (KEY,))
    assert any("memflow.frame_means" in str(node.target) for node in exported.graph.nodes)
    assert direct == []


class Means(torch.nn.Module):
    def forward(self, key):
        return frame_means(key, 2)

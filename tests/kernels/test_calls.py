"""An op goes through torch's dispatcher only where somebody listens there."""

from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from memflow_kernels import Pool, backends, frame_means, memory_attention, replace_frame
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


def test_autograd_knows_what_a_kernel_wrote(monkeypatch):
    """A kernel writes behind autograd's back; a backward that needs the old content must raise."""
    pool = Pool.zeros(1, 2, 2, 1, 4)
    monkeypatch.setattr(_call, "dispatch", lambda name, device: lambda *arguments: None)
    before = [part._version for part in pool]
    replace_frame(pool, torch.zeros(1, dtype=torch.int32), torch.ones(1, dtype=torch.int32))
    assert all(part._version > version for part, version in zip(pool, before, strict=True))
    with torch.inference_mode():
        replace_frame(Pool.zeros(1, 2, 2, 1, 4), *(torch.zeros(1, dtype=torch.int32) for _ in range(2)))


def test_an_op_runs_on_the_device_of_its_tensors(monkeypatch):
    """Triton launches on the current device, whatever its arguments lie on."""
    entered = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device) or nullcontext())
    monkeypatch.setattr(backends, "implementation", lambda name, backend: lambda: "ran")
    monkeypatch.setattr(backends, "current_backend", lambda device, name=None: "triton")
    assert backends.dispatch("frame_means", torch.device("cuda", 0))() == "ran"
    assert entered == []
    assert backends.dispatch("frame_means", torch.device("cuda", 1))() == "ran"
    assert entered == [torch.device("cuda", 1)]

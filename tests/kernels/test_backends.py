import pytest
import torch

from memflow_kernels import available_backends, frame_means, use_backend
from memflow_kernels.backends import current_backend, implementation
from memflow_kernels.reference import frame_means as reference

CPU = torch.device("cpu")


def test_torch_is_always_available():
    assert available_backends()["torch"] is None


def test_a_missing_backend_says_why():
    missing = {name: reason for name, reason in available_backends().items() if reason is not None}
    for name, reason in missing.items():
        assert len(reason) > 10
        with pytest.raises(RuntimeError, match="cannot run here"), use_backend(name):
            pass


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="names the backend 'metal'; known backends: torch"), use_backend("metal"):
        pass


def test_use_backend_ends_with_its_block(monkeypatch):
    monkeypatch.setattr("memflow_kernels.backends.BACKENDS", {"torch": None, "other": None})
    monkeypatch.setattr("memflow_kernels.backends._require", lambda name, source: name)
    with use_backend("other"):
        with use_backend("torch"):
            assert current_backend(CPU) == "torch"
        assert current_backend(CPU) == "other"
    assert current_backend(CPU) == "torch"


def test_environment_variable(monkeypatch):
    monkeypatch.setenv("MEMFLOW_BACKEND", "torch")
    assert frame_means(torch.ones(1, 2, 1, 1), 2).item() == 1
    monkeypatch.setenv("MEMFLOW_BACKEND", "metal")
    with pytest.raises(ValueError, match="MEMFLOW_BACKEND names the backend 'metal'"):
        frame_means(torch.ones(1, 2, 1, 1), 2)
    with use_backend("torch"):  # what the code asks for counts more than the environment
        assert frame_means(torch.ones(1, 2, 1, 1), 2).item() == 1


def test_implementation():
    assert implementation("frame_means", "torch") is reference
    with pytest.raises(RuntimeError, match="has no op 'no_such_op'"):
        implementation("no_such_op", "torch")

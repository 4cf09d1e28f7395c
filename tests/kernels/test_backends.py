import pytest
import torch

from memflow_kernels import available_backends, backends, frame_means, use_backend
from memflow_kernels.backends import current_backend, implementation
from memflow_kernels.operators import OPERATORS
from memflow_kernels.reference import frame_means as reference
from memflow_kernels.testing import states

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


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


def test_use_backend_as_a_statement_holds_until_the_next(monkeypatch):
    monkeypatch.setattr("memflow_kernels.backends._require", lambda name, source: name)
    monkeypatch.setattr(backends, "_forced", None)
    use_backend("other")
    assert current_backend(CPU) == "other"
    with use_backend("third"):
        assert current_backend(CPU) == "third"
    assert current_backend(CPU) == "other"

    @use_backend("third")
    def inside():
        return current_backend(CPU)

    assert (current_backend(CPU), inside(), current_backend(CPU)) == ("other", "third", "other")
    again = use_backend("torch")
    with again, again:
        assert current_backend(CPU) == "torch"
    assert current_backend(CPU) == "other"


def test_environment_variable(monkeypatch):
    monkeypatch.setenv("MEMFLOW_BACKEND", "torch")
    assert frame_means(torch.ones(1, 2, 1, 1), 2).item() == 1
    monkeypatch.setenv("MEMFLOW_BACKEND", "metal")
    with pytest.raises(ValueError, match="MEMFLOW_BACKEND names the backend 'metal'"):
        frame_means(torch.ones(1, 2, 1, 1), 2)
    with use_backend("torch"):  # what the code asks for counts more than the environment
        assert frame_means(torch.ones(1, 2, 1, 1), 2).item() == 1


def test_triton_is_not_there_without_its_package(monkeypatch):
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    assert "not installed" in available_backends()["triton"]
    assert current_backend(GPU) == "torch"


def test_triton_needs_a_gpu_or_the_interpreter(monkeypatch):
    pytest.importorskip("triton", reason="the package triton is not installed")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert available_backends()["triton"] is None
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(backends, "_gpu_missing", lambda: "no GPU at all")
    assert available_backends()["triton"] == "no GPU at all"
    assert current_backend(GPU) == "torch"
    monkeypatch.setattr(backends, "_gpu_missing", lambda: None)
    assert current_backend(GPU) == "triton"
    assert current_backend(CPU) == "torch"
    with use_backend("triton"), pytest.raises(RuntimeError, match="frame_means: the backend 'triton' runs on a GPU"):
        frame_means(torch.ones(1, 2, 1, 1), 2)


def test_an_old_gpu_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    assert backends._gpu_missing.__wrapped__() == "Some GPU is too old: compute capability 8.0 (Ampere) is needed"


def test_float64_goes_to_the_specification():
    """The kernels compute in float32; float64 results are exact all the same."""
    if available_backends()["triton"] is not None:
        pytest.skip(available_backends()["triton"])
    key = states(1, 6, 2, 3, dtype=torch.float64)
    assert torch.equal(implementation("frame_means", "triton")(key, 3), reference(key, 3))


def test_every_backend_has_every_op():
    """A backend that can run here runs all that the table names; the specification is one of them."""
    for name, reason in available_backends().items():
        assert reason is not None or all(callable(implementation(op, name)) for op in OPERATORS)


def test_implementation():
    assert implementation("frame_means", "torch") is reference
    with pytest.raises(RuntimeError, match="has no op 'no_such_op'"):
        implementation("no_such_op", "torch")

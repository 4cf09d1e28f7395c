"""For which architectures the CUDA kernels are built, and which GPUs each serves."""

import pytest

from memflow_kernels.cuda.builder import BuildError
from memflow_kernels.cuda.builder.toolchain import DEFAULT, Architecture, architectures, parse

KNOWN = frozenset({"80", "86", "89", "90", "100", "120"})


@pytest.fixture(autouse=True)
def nothing_asked_for(monkeypatch):
    monkeypatch.delenv("MEMFLOW_CUDA_ARCHS", raising=False)


def test_architectures_are_parsed():
    assert [str(x) for x in parse("8.0; 9.0a,10.0f 12.0+PTX;;8.0")] == ["8.0", "9.0a", "10.0f", "12.0+PTX"]
    assert parse("9.0a")[0].flags == ["-gencode=arch=compute_90a,code=sm_90a"]
    assert parse("12.0+PTX")[0].flags == ["-gencode=arch=compute_120,code=[sm_120,compute_120]"]


@pytest.mark.parametrize("text", ["80", "sm_80", "9.0b", "8.0;nine", "8.0PTX", "10.10.1"])
def test_what_is_no_architecture_is_named(text):
    with pytest.raises(BuildError, match="needed is a list like '8"):
        parse(text)


def test_old_architectures_are_refused():
    with pytest.raises(BuildError, match=r"'7\.5'; the kernels need 8\.0"):
        parse("7.5;8.0")


def test_the_default_is_what_the_compiler_knows_of_it():
    assert ";".join(map(str, architectures(KNOWN, "nvcc"))) == DEFAULT
    assert [str(x) for x in architectures({"75", "80", "86", "89", "90"}, "nvcc 12.4")] == ["8.0", "8.6", "8.9", "9.0a"]
    with pytest.raises(BuildError, match=r"nvcc 10\.2 knows none of 8\.0;"):
        architectures({"70"}, "nvcc 10.2")


def test_an_architecture_that_was_asked_for_must_be_known(monkeypatch):
    monkeypatch.setenv("MEMFLOW_CUDA_ARCHS", "8.0;12.0a")
    assert [str(x) for x in architectures(KNOWN, "nvcc")] == ["8.0", "12.0a"]
    with pytest.raises(BuildError, match=r"asks for 12\.0a, unknown to nvcc 12\.4"):
        architectures({"80", "90"}, "nvcc 12.4")


@pytest.mark.parametrize(
    ("name", "served", "not_served"),
    [
        ("8.0", [(8, 0), (8, 6), (8, 9)], [(9, 0), (7, 5)]),
        ("8.6", [(8, 6), (8, 9)], [(8, 0)]),
        ("9.0a", [(9, 0)], [(9, 1), (10, 0), (8, 0)]),
        ("10.0f", [(10, 0), (10, 3)], [(12, 0)]),
        ("8.9+PTX", [(8, 9), (9, 0), (13, 0)], [(8, 6)]),
    ],
)
def test_which_gpus_an_architecture_serves(name, served, not_served):
    (architecture,) = parse(name)
    assert all(architecture.serves(capability) for capability in served)
    assert not any(architecture.serves(capability) for capability in not_served)


def test_the_list_does_not_depend_on_the_gpu_that_is_present(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    assert Architecture(8, 0) in architectures(KNOWN, "nvcc")

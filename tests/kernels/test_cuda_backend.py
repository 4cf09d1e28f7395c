"""The backend `cuda` where there is no GPU: what it would run, and that everything else runs on another backend."""

import warnings

import pytest
import torch
from fake_nvcc import fake_nvcc

import memflow_kernels.cuda as backend
import memflow_kernels.reference as specification
from memflow_kernels import backends, cuda, use_backend
from memflow_kernels.backends import current_backend
from memflow_kernels.cuda import coverage, extension
from memflow_kernels.cuda.builder import source_folder
from memflow_kernels.operators import OPERATORS
from memflow_kernels.testing import states

GPU = torch.device("cuda", 0)
HALF = {"dtype": torch.bfloat16}


@pytest.fixture
def loaded(monkeypatch):
    """As if the library had been loaded: the calls of its ops, as (name, arguments)."""
    calls = []
    for name in coverage.LIMITS:
        monkeypatch.setattr(
            torch.ops.memflow_cuda, name, lambda *arguments, name=name: calls.append((name, arguments)), raising=False
        )
    monkeypatch.setattr(extension, "unloadable", lambda: None)
    monkeypatch.setattr(extension, "not_compiled_for", lambda index: None)
    return calls


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Nothing is known yet about compilers and libraries. Returns the place of a fake nvcc."""
    for name in ("MEMFLOW_CUDA_ARCHS", "NVCC_APPEND_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MEMFLOW_CUDA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(extension, "AHEAD_OF_TIME", tmp_path / "memflow_cuda.abi3.so")
    cached = (extension._recipe, extension.unloadable, extension.not_compiled_for)
    for function in cached:
        function.cache_clear()
    yield tmp_path / "home" / "bin" / "nvcc"
    for function in cached:
        function.cache_clear()


def pool(heads: int, head_dim: int, slots: int = 2, tokens: int = 6, **options) -> tuple[torch.Tensor, ...]:
    key, value = (states(1, slots * tokens, heads, head_dim, seed=seed, **options) for seed in (1, 2))
    mean = specification.frame_means(key, tokens)
    return key, value, mean


def calls(heads: int = 2, head_dim: int = 64, frames: int = 3, **options) -> dict[str, tuple]:
    """Arguments of every op of the library."""
    x = states(1, 12, heads, head_dim, **options)
    mean = specification.frame_means(states(1, frames, heads, head_dim, **options), 1)
    slots = torch.tensor([1, 0], dtype=torch.int32)
    weight = torch.ones(heads * head_dim, dtype=x.dtype)
    parts = pool(heads, head_dim, **options)
    scores = states(1, 5, frames, 1, **options)[..., 0]
    wide = mean.new_zeros
    return {
        "cover_frames": (scores, wide(1, 5) + 1, 2, wide(1, frames)),
        "frame_means": (x, 4),
        "memory_attention": (x, x, x, None, 4, 0, 0.1, None),
        "prompt_relevance_mean": (x, mean, None, 0.1),
        "prompt_relevance_softmax": (x, x, None, 4, 0.1),
        "prompt_relevance_token": (x, mean, None, 0.1),
        "qk_norm_rope_write": (x, x, x, weight, weight, 1e-6, 2, 3, 0, None, *parts, slots, True),
        "replace_frame": (*parts, slots[:1], slots[1:]),
        "select_frames": (x, mean, 2, None, None),
    }


@pytest.mark.parametrize("name", coverage.LIMITS)
def test_what_the_library_has_is_run_by_it(loaded, name):
    arguments = calls(**HALF)[name]
    getattr(backend, name)(*arguments)
    assert [call[0] for call in loaded] == [name]
    assert all(mine is given for mine, given in zip(loaded[0][1], arguments, strict=True))


UNSERVED = {  # why -> (op, its arguments)
    "bfloat16 and float16 with head size D = 64 or 128, not torch.float32": ("memory_attention", {}),
    "not torch.bfloat16 with D = 80": ("memory_attention", {"head_dim": 80, **HALF}),
    "up to 12288 candidates, not 12289": ("select_frames", {"head_dim": 2, "frames": 12289}),
    "it takes 2 T + 9 F up to 12287, not 12295": ("cover_frames", {"head_dim": 2, "frames": 1365}),
    "up to 8192 channels H*D, not 8194": ("qk_norm_rope_write", {"head_dim": 4097 * 2, "heads": 1, **HALF}),
    **{f"float64, which is there to check {name}": (name, {"dtype": torch.float64}) for name in coverage.LIMITS},
}


@pytest.mark.parametrize(("reason", "call"), UNSERVED.items(), ids=lambda x: x if isinstance(x, str) else "")
def test_what_it_does_not_take_runs_elsewhere(loaded, monkeypatch, reason, call):
    """With the same result as that backend's, and nothing asked of the library."""
    monkeypatch.setattr(backends, "uncompiled", lambda: "torch")
    name, sizes = call
    arguments, again = calls(**sizes)[name], calls(**sizes)[name]
    assert reason.rpartition(" check ")[0] in coverage.unserved(name, *arguments)
    got, wanted = getattr(backend, name)(*arguments), getattr(specification, name)(*again)
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    torch.testing.assert_close(arguments, again, rtol=0, atol=0)  # those that it writes into
    assert not loaded


@pytest.mark.parametrize("name", sorted(set(OPERATORS) - set(coverage.LIMITS) - {"memory_attention_top_k"}))
def test_what_has_no_kernel_runs_elsewhere(loaded, monkeypatch, name):
    said = []
    monkeypatch.setattr(backends, "implementation", lambda op, other: lambda *arguments: said.append((op, other)))
    getattr(backend, name)(states(1, 2, 1, 4))
    assert said == [(name, backends.uncompiled())]
    assert coverage.unserved(name) == f"{name} has no compiled kernel"


def test_a_choice_and_its_attention_are_run_by_the_library(loaded, monkeypatch):
    x = states(1, 12, 2, 64, **HALF)
    mean = specification.frame_means(x, 4)[:, :2]

    def attend(*arguments):
        loaded.append(("memory_attention", arguments))
        return ()

    monkeypatch.setattr(torch.ops.memflow_cuda, "memory_attention", attend)
    backend.memory_attention_top_k(x, x, x, mean, None, 4, 2, 1, 0.1, None)
    assert [name for name, _ in loaded] == ["select_frames", "memory_attention"]
    assert loaded[0][1][1] is mean and loaded[1][1][0] is x and loaded[1][1][4:] == (4, 2, 0.1, None)


def test_the_limits_are_those_of_the_c_interface():
    interface = (source_folder() / "launch.h").read_text()
    assert f"F at most {coverage.MOST_CANDIDATES}." in interface
    assert f"2 T + 9 F at most {coverage.MOST_COVERED}." in interface
    assert f"H*D at most {coverage.MOST_CHANNELS}." in interface
    assert "bfloat16 and float16 with D = 64 or 128" in interface and coverage.HEAD_SIZES == (64, 128)


def test_a_failed_build_is_reported_once_and_others_run(fresh, tmp_path):
    """The compiler's own first error, in one warning; later calls neither warn nor build again."""
    calls_made = tmp_path / "calls"
    fake_nvcc(fresh, f"echo x >> {calls_made}; echo 'means.cu(7): error: no such thing'; echo more; exit 2")
    key = states(1, 6, 2, 4)
    with pytest.warns(RuntimeWarning, match=r"others run in their place: means\.cu\(7\): error: no such thing \(all"):
        first = backend.frame_means(key, 3)
    made = calls_made.read_text()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = backend.frame_means(key, 3)
    assert calls_made.read_text() == made
    assert torch.equal(first, again) and torch.equal(first, specification.frame_means(key, 3))


def test_a_library_that_does_not_load_is_reported(fresh):
    fake_nvcc(fresh)
    with pytest.warns(RuntimeWarning, match=r"others run in their place: .*memflow_cuda\.so"):
        assert "memflow_cuda.so" in extension.unloadable()


def test_a_library_for_other_gpus_is_reported(fresh, monkeypatch):
    monkeypatch.setattr(torch.ops.memflow_cuda, "architectures", lambda: "8.0;9.0a", raising=False)
    capability = [(8, 6), (9, 0), (12, 1)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability[index])
    assert extension.not_compiled_for(0) is None
    assert extension.not_compiled_for(1) is None
    with pytest.warns(RuntimeWarning, match=r"compiled for 8\.0;9\.0a, not for this GPU: .*MEMFLOW_CUDA_ARCHS=12\.1"):
        assert extension.not_compiled_for(2)


def test_why_the_backend_is_missing(fresh, monkeypatch):
    monkeypatch.setattr(backends, "_gpu_missing", lambda: None)
    fake_nvcc(fresh)
    assert backends.available_backends()["cuda"] is None
    fresh.write_text("#!/bin/sh\nexit 1\n")
    extension._recipe.cache_clear()
    reason = "no compiled kernels are installed, and none can be built: "
    assert backends.available_backends()["cuda"].startswith(f"{reason}{fresh} --version failed")
    with pytest.raises(RuntimeError, match="cannot run here: no compiled kernels"), use_backend("cuda"):
        pass
    extension.AHEAD_OF_TIME.write_bytes(b"")  # a library from a wheel needs no compiler
    assert backends.available_backends()["cuda"] is None
    assert extension.described() == f"built ahead of time, {extension.AHEAD_OF_TIME}"
    monkeypatch.setattr(backends, "_gpu_missing", lambda: "no GPU at all")
    assert backends.available_backends()["cuda"] == "no GPU at all"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert backends.available_backends()["cuda"] == "the compiled kernels are for NVIDIA GPUs"


def test_a_cached_library_is_described(fresh):
    fake_nvcc(fresh)
    assert extension.described().startswith("not built yet; the first use on a GPU does it with nvcc 13.0.88")
    library = extension._library()
    assert extension.described() == f"built at an earlier use, {library}"


def test_cpu_tensors_are_refused(monkeypatch):
    monkeypatch.setattr(backends, "_require", lambda name, source: name)
    with (
        use_backend("cuda"),
        pytest.raises(RuntimeError, match="frame_means: the backend 'cuda' runs on a GPU, not on"),
    ):
        cuda.backends.dispatch("frame_means", torch.device("cpu"))


def test_it_is_the_default_only_where_it_was_measured_to_be_faster(monkeypatch):
    monkeypatch.setattr(backends, "uncompiled", lambda: "triton")
    monkeypatch.setattr(backends, "_cuda_missing", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(9, 0), (8, 0)][index])
    assert current_backend(GPU, "memory_attention") == "triton"
    monkeypatch.setattr(backends, "COMPILED_IS_FASTER", frozenset({("memory_attention", "sm_90")}))
    backends._compiled_is_faster.cache_clear()
    assert current_backend(GPU, "memory_attention") == "cuda"
    assert current_backend(GPU, "frame_means") == "triton"
    assert current_backend(torch.device("cuda", 1), "memory_attention") == "triton"
    assert current_backend(torch.device("cpu"), "memory_attention") == "torch"
    backends._compiled_is_faster.cache_clear()
    monkeypatch.setattr(backends, "_cuda_missing", lambda: "no compiler")
    assert current_backend(GPU, "memory_attention") == "triton"
    backends._compiled_is_faster.cache_clear()

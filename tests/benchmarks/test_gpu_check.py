"""What of `make gpu-check` a machine without a GPU can show: that it says so, and that the speed table is right."""

import pytest
import torch

from benchmarks import gpu_check, gpu_speed
from memflow_kernels import available_backends

GROUPS = ["attention", "write", "frame_means", "relevance mean", "relevance softmax", "selection", "replacement"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the check would run for minutes")
def test_without_a_gpu_it_fails_and_says_why(capsys):
    assert gpu_check.main([]) == 1
    assert "no GPU" in capsys.readouterr().err


def test_unknown_steps_are_refused(capsys):
    with pytest.raises(SystemExit):
        gpu_check.main(["sped"])
    assert "unknown step 'sped'; there are build, tests, memcheck, racecheck, speed" in capsys.readouterr().err


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_speed_table_on_a_tiny_model(backend):
    """The same calls as on a GPU; through Triton's interpreter the times mean nothing, the results must be right."""
    reason = available_backends()[backend]
    if reason is not None:
        pytest.skip(f"backend {backend}: {reason}")
    rows, ceilings, wrong = gpu_speed.measure(torch.device("cpu"), gpu_speed.TINY, {"ours": backend}, budget=0.01)
    assert wrong == []
    assert list(dict.fromkeys(row["group"] for row in rows)) == GROUPS
    assert all(row["milliseconds"]["median"] > 0 for row in rows)
    assert len(gpu_speed.table(rows).splitlines()) == len(rows) + 1
    assert len(gpu_speed.targets(rows, ceilings)) == 5


def test_a_row_for_every_backend():
    """With the compiled kernels present, each op is there once more."""
    ours = {"ours": "torch", "ours (cuda)": "torch"}
    rows, _, wrong = gpu_speed.measure(torch.device("cpu"), gpu_speed.TINY, ours, budget=0.01)
    assert wrong == []
    named = [(row["group"], row["name"]) for row in rows]
    assert len(named) == len(set(named))
    assert {group for group, name in named if name.startswith("ours (cuda)")} == set(GROUPS)


def test_a_wrong_result_gets_no_time(monkeypatch):
    good = gpu_speed.update_calls
    monkeypatch.setattr(
        gpu_speed, "update_calls", lambda *args: [c._replace(expected=c.expected + 1) for c in good(*args)]
    )
    rows, _, wrong = gpu_speed.measure(torch.device("cpu"), gpu_speed.TINY, {"ours": "torch"}, budget=0.01)
    assert len(wrong) == 8
    assert {row["group"] for row in rows} == {"attention", "write", "frame_means"}


def test_no_target_is_met_by_nothing():
    assert gpu_speed.targets([], {}) == {"the attention was measured": False}


def test_without_a_compiler_the_build_is_left_out_and_says_why(monkeypatch):
    monkeypatch.setattr(gpu_check.extension, "missing", lambda: "no nvcc anywhere")
    assert gpu_check.build() == {"passed": None, "seconds": 0, "said": ["did not run: no nvcc anywhere"]}
    assert gpu_check.ours() == {"ours": "triton"}


def test_a_build_that_fails_is_a_failure(monkeypatch):
    monkeypatch.setattr(gpu_check.extension, "missing", lambda: None)
    monkeypatch.setattr(gpu_check.extension, "unloadable", lambda: "a.cu(1): error: no")
    found = gpu_check.build()
    assert not found["passed"] and found["passed"] is not None
    assert found["said"] == ["a.cu(1): error: no"]
    assert gpu_check.ours() == {"ours": "triton"}


@pytest.mark.parametrize(
    ("capability", "expected"), [((8, 0), "8.0"), ((8, 7), "8.6"), ((9, 0), "9.0a"), ((12, 1), "12.1")]
)
def test_the_kernels_are_built_for_the_gpu_that_is_checked(capability, expected):
    assert gpu_check.architecture(capability) == expected


def test_a_missing_sanitizer_is_a_failure(monkeypatch):
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: None)
    monkeypatch.setattr(gpu_check.Path, "exists", lambda path: False)
    found = gpu_check.sanitizer("memcheck")
    assert not found["passed"]
    assert "not installed" in found["said"][0]

"""What of `make gpu-check` a machine without a GPU can show: its steps, their limits, and what becomes of a failure."""

import json
import sys

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.sanitizers import reports, sifted
from memflow_kernels import available_backends


@pytest.fixture
def machine():
    return gpu_check.Machine(rehearse=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the check would run for minutes")
def test_without_a_gpu_it_fails_and_says_why(capsys):
    assert gpu_check.main([]) == 1
    assert "no GPU" in capsys.readouterr().err


def test_unknown_steps_are_refused(capsys):
    with pytest.raises(SystemExit):
        gpu_check.main(["sped"])
    said = capsys.readouterr().err
    assert "unknown step 'sped'; there are build, correct, speed, tests, memcheck, racecheck" in said


def test_a_rehearsal_is_not_written_among_the_results(capsys):
    with pytest.raises(SystemExit):
        gpu_check.main(["--rehearse"])
    assert "name a file for it with --output" in capsys.readouterr().err


@pytest.mark.slow
def test_every_step_rehearsed(tmp_path):
    """As `make gpu-check` begins them, each in a process of its own: it ends, with a result or with its reason."""
    if available_backends()["triton"] is not None:
        pytest.skip(f"backend triton: {available_backends()['triton']}")
    output = tmp_path / "rehearsal.json"
    assert gpu_check.main(["--rehearse", "-o", str(output)]) == 1
    found = json.loads(output.read_text())
    assert all(found[step]["passed"] for step in ("build", "correct", "tests")), found
    assert found["speed"]["wrong"] == []
    for step in ("memcheck", "racecheck"):
        assert found[step]["said"] == ["it needs a GPU: this step did not run"]


def test_one_step_rehearsed(tmp_path, capsys):
    output = tmp_path / "rehearsal.json"
    assert gpu_check.main(["racecheck", "--rehearse", "-o", str(output)]) == 1
    found = json.loads(output.read_text())
    assert found["racecheck"]["said"] == ["it needs a GPU: this step did not run"]
    assert "racecheck  FAILED" in capsys.readouterr().out


def test_a_step_that_crashes_keeps_what_it_found(machine, tmp_path, monkeypatch):
    def crash(machine, report):
        report({"rows": [1, 2]})
        assert json.loads(output.read_text())["speed"]["said"] == ["did not end"]  # what a killed process leaves
        raise RuntimeError("an illegal memory access\nand more")

    output = tmp_path / "found.json"
    output.write_text(json.dumps({"tests": {"passed": True}}))
    monkeypatch.setitem(gpu_check.ACTIONS, "speed", crash)
    gpu_check.one_step("speed", machine, output)
    found = json.loads(output.read_text())
    assert found["tests"] == {"passed": True}
    assert found["speed"]["rows"] == [1, 2] and not found["speed"]["passed"]
    assert found["speed"]["said"] == ["RuntimeError: an illegal memory access"]


def test_a_step_that_hangs_is_stopped():
    script = "print('begun', flush=True); import time; time.sleep(60)"
    code, lines = gpu_check.run([sys.executable, "-c", script], True, 3)
    assert code is None and lines == ["begun"]


def test_without_a_compiler_the_cuda_kernels_are_left_out(machine, monkeypatch):
    monkeypatch.setattr(gpu_check.extension, "missing", lambda: "no nvcc anywhere")
    monkeypatch.setattr(gpu_check, "run", lambda *args: (0, []))
    found = gpu_check.build(machine, lambda found: None)
    assert found["passed"] and found["said"][0] == "left out: no nvcc anywhere"
    machine.rehearse = False
    assert machine.ours() == {"ours": "triton"}


def test_a_build_that_fails_is_a_failure(machine, monkeypatch):
    machine.rehearse = False
    monkeypatch.setattr(gpu_check.extension, "missing", lambda: None)
    monkeypatch.setattr(gpu_check.extension, "unloadable", lambda: "a.cu(1): error: no")
    assert gpu_check.build(machine, lambda found: None) == {"passed": False, "said": ["a.cu(1): error: no"]}
    assert machine.ours() == {"ours": "triton"}


def test_kernels_that_do_not_compile_are_a_failure(machine, monkeypatch):
    monkeypatch.setattr(gpu_check, "run", lambda *args: (1, ["CompilationError: at 1:1"]))
    found = gpu_check.build(machine, lambda found: None)
    assert not found["passed"] and found["said"][1:] == ["CompilationError: at 1:1"]


def test_other_chips_compile_at_first_use(machine, monkeypatch):
    machine.capability = (8, 6)
    monkeypatch.setattr(gpu_check, "run", lambda *args: pytest.fail("nothing is to be compiled"))
    found = gpu_check.build(machine, lambda found: None)
    assert found["passed"] and found["said"][1] == "nothing compiled ahead of time for sm_86"


@pytest.mark.parametrize(
    ("capability", "expected"), [((8, 0), "8.0"), ((8, 7), "8.6"), ((9, 0), "9.0a"), ((12, 1), "12.1")]
)
def test_the_kernels_are_built_for_the_gpu_that_is_checked(capability, expected):
    assert gpu_check.architecture(capability) == expected


def test_every_process_finds_the_built_library(monkeypatch, tmp_path):
    """Tests move the user's cache folder; the library is looked for where it was built."""
    monkeypatch.delenv("MEMFLOW_CUDA_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert gpu_check.environment(False)["MEMFLOW_CUDA_CACHE"] == str(tmp_path / "memflow" / "cuda")


def test_a_missing_sanitizer_is_a_failure(machine, monkeypatch):
    machine.rehearse = False
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: None)
    monkeypatch.setattr(gpu_check.Path, "exists", lambda path: False)
    found = gpu_check.sanitizer("memcheck", machine, lambda found: None)
    assert not found["passed"]
    assert "not installed" in found["said"][0]


RACE = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at forward_kernel+0x1a0 in attention.py:50
=========     and Read access at forward_kernel+0x2b0 in attention.py:60 [8 hazards]
=========
========= Error: Race reported between Write access at select_kernel+0x10 in selection.py:5
=========     and Read access at select_kernel+0x20 in selection.py:6 [1 hazards]
========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)
..                                                                   [100%]
2 passed in 1.00s"""
ACCESS = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 16 bytes
=========     at forward_kernel+0x1a0 in attention.py:50
=========     by thread (0,0,0) in block (0,0,0)
========= ERROR SUMMARY: 1 error"""


def test_known_false_alarms_are_counted_and_nothing_else():
    assert len(reports(RACE.splitlines())) == 2
    standing, explained = sifted("racecheck", RACE.splitlines())
    assert len(standing) == 1 and "select_kernel" in standing[0]
    assert explained == {"forward_kernel: reads keys and values by bulk copies": 1}


def test_no_access_outside_is_a_false_alarm():
    standing, explained = sifted("memcheck", ACCESS.splitlines())
    assert len(standing) == 1 and "by thread" in standing[0] and explained == {}


def test_reports_fail_a_sanitizer_although_the_tests_pass(machine, monkeypatch):
    machine.rehearse = False
    monkeypatch.setattr(gpu_check.Path, "exists", lambda path: True)
    monkeypatch.setattr(gpu_check, "run", lambda *args, **variables: (0, RACE.splitlines()))
    found = gpu_check.sanitizer("racecheck", machine, lambda found: None)
    assert not found["passed"] and len(found["reports"]) == 1

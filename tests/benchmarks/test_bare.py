"""What a machine with torch alone can do, and the two names of the command."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from memflow_bench.ceilings import ceilings, highest

ROOT = Path(__file__).parents[2]
WITHOUT = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("diffusers", "transformers", "peft", "accelerate", "matplotlib", "safetensors"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
"""
STUDIES = "import benchmarks.gpu_check, benchmarks.gpu_calls, benchmarks.gpu_correct, benchmarks.gpu_speed\n"
CHUNK = """
import torch
import memflow_bench.worker
from memflow_bench.cases import case
from memflow_bench.command import run_whole
from memflow_bench.experiments import Experiment, StreamExperiment
from memflow_bench.providers import PROVIDERS
from memflow_bench.runner import run_experiment
cpu = torch.device("cpu")
rows = run_experiment(Experiment("chunk", case("tiny"), "float32"), [PROVIDERS["published path"]], cpu)
rows += run_whole(StreamExperiment(case("toy")), cpu)
rows += run_experiment(Experiment("write", case("tiny"), "float32", budget=0), [PROVIDERS["ours (torch)"]], cpu)
print([(row.status, row.reason) for row in rows])
"""


def test_gpu_check_and_the_ops_need_no_model_library():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT + STUDIES + CHUNK], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    missing = "('missing', 'the module diffusers is not installed')"
    assert f"[{missing}, {missing}, {missing}, ('ok', '')]" in done.stdout


def test_every_study_loads():
    studies = [file.stem for file in sorted((ROOT / "benchmarks").glob("*.py")) if not file.stem.startswith("_")]
    assert "covering" in studies
    loaded = [sys.executable, "-c", "".join(f"import benchmarks.{name}\n" for name in studies)]
    done = subprocess.run(loaded, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", ["benchmarks", "memflow_bench"])
def test_the_command_by_both_names(module):
    done = subprocess.run(
        [sys.executable, "-m", module, "cases"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "wan-1.3b-480p" in done.stdout


def test_ceilings_are_the_best_of_several(monkeypatch):
    monkeypatch.setattr("memflow_bench.ceilings.PRODUCTS", {"cpu": ((1, 64, 64, 64), (2, 128, 64, 256))})
    monkeypatch.setattr("memflow_bench.ceilings.COPIES", {"cpu": (2**16, 2**20)})
    seconds = iter([5.0] * 20 + [4.0] * 5 + [2.0] * 5)  # two products in two types, two copies
    monkeypatch.setattr("memflow_bench.ceilings.sample", lambda *arguments: (next(seconds), None))
    found = ceilings(torch.device("cpu"), torch.bfloat16)
    assert found == {"flops": 2 * 2 * 128 * 64 * 256 / 5.0, "bytes": 2 * 2**20 / 2.0}
    later = {"bfloat16": {"flops": 1e12, "bytes": 1.0}}
    assert highest({"bfloat16": found}, later) == {"bfloat16": {"flops": 1e12, "bytes": found["bytes"]}}

"""Every Triton kernel compiles for every family of GPUs, without one: no spill where it counts, and it fits.

`make test` compiles what a video model in bfloat16 needs, for Hopper and for MI300; the whole product of kernels,
configurations and chips is slow. -s shows the table.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the package triton is not installed")

import aot

from memflow_kernels.triton.configs import SHARED_MEMORY

HERE = Path(__file__).parent
MODEL = ("*bf16", "attention bf16 D=128")


def compile_for(chip, *patterns):
    """aot.compile_for in a process of its own, in which Triton compiles rather than interprets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[1]), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "ignore", HERE / "aot.py", chip, "--json", "--cases", *patterns]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    print("\n" + aot.table(result["rows"]))
    return result


def check(chip, rows):
    too_large = [row for row in rows if row["shared"] > SHARED_MEMORY[chip]]
    assert not too_large, aot.table(too_large)
    forward = [row for row in rows if row["kernel"].startswith("forward") and row["case"].endswith("16 D=128")]
    assert forward, "no attention forward was compiled"
    spilled = [row for row in forward if row["spilled"]]
    assert not spilled, aot.table(spilled)
    if chip == "sm_90":
        assert all(row["wgmma"] for row in forward), aot.table(forward)


@pytest.mark.parametrize("chip", ["sm_90", "gfx942"])
def test_a_model_in_bfloat16_compiles(chip):
    check(chip, compile_for(chip, *MODEL)["rows"])


@pytest.mark.slow
@pytest.mark.parametrize("chip", aot.TARGETS)
def test_every_kernel_compiles_in_every_configuration(chip):
    result = compile_for(chip, "*")
    check(chip, result["rows"])
    assert not result["kernels"], f"no case of aot_cases.py launches {result['kernels']}"
    assert not result["configs"], f"no case of aot_cases.py uses {result['configs']}"

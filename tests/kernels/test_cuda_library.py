"""The library that nvcc makes of csrc/: it loads without a GPU, under any torch and Python, and explains itself."""

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nvcc_build
import pytest

import memflow_kernels.reference as specification
from memflow_kernels.cuda.coverage import LIMITS

ARCHITECTURE = "8.0"
OTHER = "MEMFLOW_OTHER_PYTHON"


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    return nvcc_build.build(tmp_path_factory, ARCHITECTURE) / nvcc_build.NAME


def ask(python: str, library: Path) -> dict:
    """What that Python's torch meets in the library."""
    script = Path(__file__).with_name("cuda_library.py")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([python, str(script), str(library)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def met(library) -> dict:
    return ask(sys.executable, library)


def test_schemas(met):
    """Every op of the backend takes what the specification takes, in the same order, but for what has a default at the
    end: a call leaves that out, or is not for the compiled kernels (coverage.py)."""
    schemas = {}
    for schema in met["schemas"]:
        name, arguments = re.match(r"memflow_cuda::(\w+)\((.*)\) ->", schema).groups()
        schemas[name] = [argument.split()[-1] for argument in arguments.split(", ") if argument]
    assert set(schemas) == {*LIMITS, "gather_frames", "architectures", "runtime_error"}
    for name in LIMITS:
        parameters = list(inspect.signature(getattr(specification, name)).parameters.values())
        while len(parameters) > len(schemas[name]) and parameters[-1].default is not inspect.Parameter.empty:
            parameters.pop()
        assert schemas[name] == [parameter.name for parameter in parameters], name
    assert met["architectures"] == ARCHITECTURE


def test_without_a_gpu_the_runtime_says_so(met):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here, and nothing to complain about")
    assert "driver" in met["runtime_error"] or "device" in met["runtime_error"]


ERRORS = {
    "on the CPU": "key must be on a CUDA device",
    "tokens": "key has 12 tokens, not a multiple of tokens_per_frame = 5",
    "tokens_per_frame": "tokens_per_frame must be at least 1, got 0",
    "dimensions": "key must have 4 dimensions, got the shape [12, 2, 64]",
    "dtype": "key must be float32, bfloat16 or float16, got Double",
    "stride": "key must have a dense last dimension, got stride 2",
    "attention on the CPU": "query must be on a CUDA device",
    "head size": "memory_attention takes bfloat16 and float16 with head size D = 64 or 128, got BFloat16 with D = 96",
    "float32": "memory_attention takes bfloat16 and float16 with head size D = 64 or 128, got Float with D = 64",
    "key dtype": "key must be BFloat16, got Half",
    "value shape": "value must have the shape [1, 12, 2, 64], got [1, 8, 2, 64]",
    "table dtype": "frame_table must be Int, got Long",
    "table shape": "frame_table must have the shape [1, 2, 1], got [1, 1, 1]",
    "table of blocks": "frame_table must have the shape [1, 2, 3, 1], got [1, 2, 1]",
    "query_block": "query_block must be at least 1, got 0",
    "candidate_frames": "candidate_frames must be from 0 to the 3 frames of key, got 4",
    "mask dtype": "text_mask must be Bool, got Float",
    "means dtype": "frame_mean must be Float, got Half",
    "token mask shape": "text_mask must have the shape [1, 12], got [1, 3]",
    "token means shape": "frame_mean must have the shape [1, 3, 2, 64], got [1, 3, 2, 32]",
    "scores": "scores must have 3 dimensions, got the shape [5, 3]",
    "scores dtype": "scores must be float32, bfloat16 or float16, got Double",
    "weights": "weights must have the shape [1, 5], got [1, 3]",
    "prior dtype": "prior must be Float, got Half",
    "k": "k must be at least 0, got -1",
    "covering on the CPU": "scores must be on a CUDA device",
    "key shape": "key must have the shape [1, 12, 2, 64], got [1, 12, 3, 64]",
    "top_k": "top_k must be at least 1, got 0",
    "valid shape": "valid must have the shape [1, 3], got [1, 2]",
    "rows": "rows and cols must be at least 1, got 0 and 4",
    "slots": "slots must be Int, got Long",
    "weight": "weight_q must have the shape [128], got [64]",
    "start": "start must hold one number, got the shape [2]",
    "pool of another frame size": "pool_key must have the shape [1, 8, 2, 64], got [1, 24, 2, 64]",
    "write on the CPU": "query must be on a CUDA device",
    "slot shape": "slot must have the shape [1], got [1, 2, 1]",
    "pool": "pool_value must have the shape [1, 24, 2, 64], got [1, 12, 2, 64]",
    "replacement on the CPU": "pool_key must be on a CUDA device",
    "gather on the CPU": "key must be on a CUDA device",
}


def test_wrong_calls_are_explained(met):
    """Also for CPU tensors: an error in words, never a crash."""
    assert met["errors"] == ERRORS


def test_only_the_stable_abi_is_used(library):
    """Of torch the C functions of its stable ABI, of Python nothing, of CUDA no shared library."""
    nm = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True).stdout
    needed = {line.split()[-1].partition("@")[0] for line in nm.splitlines()}
    assert not [name for name in needed if name.startswith(("Py", "_Py", "cuda", "cu")) or "c10" in name]
    assert not [name for name in needed if name.startswith("_Z") and re.search(r"torch|caffe|at\d*Tensor", name)]
    assert {"torch_library_impl", "aoti_torch_library_def"} <= needed
    dynamic = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    loaded = re.findall(r"NEEDED.*\[(\w+)", dynamic)
    assert set(loaded) <= {"libtorch_cpu", "libstdc", "libgcc_s", "libm", "libc", "libdl", "librt", "libpthread", "ld"}


def test_abi3audit(library):
    audit = pytest.importorskip("abi3audit", reason="the package abi3audit is not installed")
    command = [sys.executable, "-m", audit.__name__, "--strict", "--report", "--assume-minimum-abi3", "3.10", library]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = json.loads(done.stdout)["specs"].values()
    assert found["object"]["result"]["non_abi3_symbols"] == []


def test_another_torch_loads_the_same_binary(library, met):
    """Another installation, often of another version: the same schemas and errors from the same file."""
    python = os.environ.get(OTHER)
    if not python:
        pytest.skip(f"{OTHER} names no Python with another torch of at least 2.10")
    other = ask(python, library)
    print(f"built with torch {met['torch']}; also loaded by torch {other['torch']} in Python {other['python']}")
    assert {**other, "torch": met["torch"], "python": met["python"]} == met

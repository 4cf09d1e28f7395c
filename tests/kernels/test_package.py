"""What a user meets first: the names, the cost of the import, the pool, the tools of memflow_kernels.testing."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import memflow_kernels
from memflow_kernels import Pool
from memflow_kernels.testing import LAYOUTS, assert_close, budget, poisoned_memory, relative_error, states

IMPORT = """
import json, sys, time, torch
before = set(sys.modules)
start = time.process_time()
import memflow_kernels
seconds = time.process_time() - start
print(json.dumps([seconds, sorted({name.split(".")[0] for name in set(sys.modules) - before})]))
"""


def test_import_is_light():
    """Under 0.3 s of a processor over `import torch`, best of three; without a model library or a compiler."""
    runs = [
        json.loads(subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, check=True, text=True).stdout)
        for _ in range(3)
    ]
    assert min(seconds for seconds, _ in runs) < 0.3
    assert not {"diffusers", "transformers", "triton", "memflow", "peft", "matplotlib"} & set(runs[0][1])


@pytest.mark.parametrize("package", ["memflow_kernels", "memflow"])
def test_no_private_name_of_torch(package):
    """But for the fused attention of aten, and torch.utils, where torch's documentation has dispatch modes."""
    private = re.compile(r"\btorch(\.\w+)*\._[a-zA-Z]|from torch[\w.]* import .*\b_[a-zA-Z]|\bforward_ad\._")
    paths = list((Path(memflow_kernels.__file__).parents[1] / package).rglob("*.py"))
    assert paths
    for path in paths:
        assert not private.search(re.sub(r"torch\.(ops\.aten\._scaled|utils\._)", "", path.read_text())), path


def test_public_names():
    assert set(memflow_kernels.__all__) == {
        "Pool",
        "available_backends",
        "block_causal_table",
        "cover_frames",
        "frame_means",
        "memory_attention",
        "merge_attention",
        "prompt_relevance",
        "qk_norm_rope",
        "qk_norm_rope_write",
        "replace_frame",
        "rotate_keys",
        "rotate_keys_write",
        "select_frames",
        "use_backend",
    }
    for name in memflow_kernels.__all__:
        assert getattr(memflow_kernels, name).__doc__


def test_pool():
    pool = Pool.zeros(2, 5, 3, 4, 8, dtype=torch.bfloat16)
    assert pool.key.shape == pool.value.shape == (2, 15, 4, 8)
    assert pool.frame_mean.shape == (2, 5, 4, 8)
    assert (pool.key.dtype, pool.frame_mean.dtype) == (torch.bfloat16, torch.float32)
    assert (pool.slots, pool.tokens_per_frame) == (5, 3)
    assert Pool.zeros(1, 1, 1, 1, 1, dtype=torch.float64).frame_mean.dtype == torch.float64


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_differ_in_memory_only(layout):
    x = states(2, 3, 4, 6, layout=layout)
    assert x.shape == (2, 3, 4, 6)
    assert x.stride(-1) == 1
    assert x.is_contiguous() == (layout == "dense")


def test_poisoned_memory():
    with poisoned_memory():
        assert torch.empty(3).isnan().all()
        assert torch.empty_like(torch.zeros(3, dtype=torch.bfloat16)).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_errors_are_found():
    expected = torch.ones(100)
    assert relative_error(expected, expected) == 0
    assert relative_error(expected * 1.5, expected) == pytest.approx(0.5)
    assert relative_error(torch.zeros(2), torch.tensor([0.0, -torch.inf])) == float("inf")
    assert budget(torch.bfloat16, 2) == 2**-7
    with pytest.raises(AssertionError, match=r"relative error 0\.0001, allowed 1e-05"):
        assert_close(expected * 1.0001, expected)
    with pytest.raises(AssertionError, match="relative error nan"):
        assert_close(expected * torch.nan, expected)
    with pytest.raises(AssertionError, match=r"shape \[99\] instead of \[100\]"):
        assert_close(expected[1:], expected)

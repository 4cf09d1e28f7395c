"""The kernels that only move bytes, as compiled for Hopper and launched at the model's layouts: no program without
work, 16 bytes per access, no number rounded alone, and few enough instructions per token to keep up with the memory.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import byte_code
import nvcc_build
import pytest
import torch

HERE = Path(__file__).parent
# 600 per token and warp, where a token of 12 heads x 128 is shared by 4 warps
MOST_PER_TOKEN = 4 * 600


@pytest.fixture(
    scope="module",
    params=[
        ("1", "1.3B"),
        pytest.param(("0", "1.3B"), marks=pytest.mark.slow),  # the default of Triton 3.10
        pytest.param(("1", "14B"), marks=pytest.mark.slow),
    ],
    ids=lambda param: f"{param[1]}, fp fusion {param[0]}",
)
def triton_rows(request):
    """What byte_code.report says, from a process in which Triton compiles."""
    pytest.importorskip("triton", reason="the package triton is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[1]), environment.get("PYTHONPATH", "")])
    environment["TRITON_DEFAULT_FP_FUSION"], model = request.param
    command = [sys.executable, "-W", "ignore", HERE / "byte_code.py", "--json", "--models", model]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout)
    print("\n" + byte_code.table(rows))
    return rows


def test_programs_have_work(triton_rows):
    assert {row["kernel"] for row in triton_rows} == byte_code.KERNELS
    idle = [row for row in triton_rows if row["covered"] > 1.25]
    assert not idle, byte_code.table(idle)


def test_accesses_are_16_bytes_wide_and_numbers_rounded_in_pairs(triton_rows):
    """The tables of slots and frames, one number per program, are the only narrow loads."""
    bad = [row for row in triton_rows if not row["wide"] or row["narrow"] > 1 or row["scalar conversions"]]
    assert not bad, byte_code.table(bad)
    assert not [row for row in triton_rows if row["spilled"]], byte_code.table(triton_rows)


def test_norm_and_rotation_cost_at_most_600_instructions(triton_rows):
    """Per token of 12 heads x 128 and each of 4 warps; in proportion for more heads."""
    rows = [row for row in triton_rows if row["kernel"] == "norm_rope_kernel"]
    assert len(rows) == 2  # with and without the mean of the queries
    for row in rows:
        per_token = row["loop"] * row["warps"] / row["blocks"]["BLOCK_TOKENS"]
        assert per_token <= MOST_PER_TOKEN * row["heads"] / 12, byte_code.table(rows)


def cuda_kernels(tmp_path_factory, name):
    """name of each kernel of one file of csrc/ -> what its machine code for Hopper says."""
    folder = nvcc_build.build(tmp_path_factory, "9.0a")
    listings = nvcc_build.machine_code(folder / f"{name}.o")
    return {kernel: byte_code.described(byte_code.instructions(code)) for kernel, code in listings.items()}


def test_cuda_norm_and_rotation(tmp_path_factory):
    """The kernel for 12 heads x 128 in bfloat16: a block of 6 warps, two tokens at a time."""
    kernels = cuda_kernels(tmp_path_factory, "qk_norm_rope")
    assert not [name for name, code in kernels.items() if code["scalar conversions"]]
    code = next(code for name, code in kernels.items() if "bfloat16Li8ELi1ELi2ELi192E" in name)
    print(code)
    assert code["loop"] / 2 <= 600
    assert code["wide"] >= 12 and code["narrow"] == 0  # three in and three out, of both tokens


@pytest.mark.parametrize("name", ["gather", "replacement", "means"])
def test_cuda_kernels_that_move_bytes(tmp_path_factory, name):
    """Each file has kernels for rows at whole 16 bytes, and others for any rows."""
    kernels = cuda_kernels(tmp_path_factory, name)
    assert any(code["wide"] for code in kernels.values())
    assert not [kernel for kernel, code in kernels.items() if code["scalar conversions"]]


def frames(count, heads=1, batch=1):
    """Keys as the pool holds them, a head's tokens side by side."""
    shape = (batch, heads, count * byte_code.TOKENS, byte_code.HEAD_DIM)
    return torch.zeros(shape, dtype=torch.bfloat16).transpose(1, 2)


def test_cuda_blocks_have_work(host):
    """Threads x numbers per thread / numbers to move, of a head or a frame of the model: run on the CPU."""
    per_frame = byte_code.TOKENS * byte_code.HEAD_DIM
    host.launched()
    key = frames(6)
    host.gather_frames(key, key, torch.tensor([[[0, 2]]], dtype=torch.int32), byte_code.TOKENS, 3)
    assert host.launched() * 4 * 8 / (5 * per_frame) <= 1.25
    key, value, slot = frames(2, heads=2), frames(2, heads=2), torch.tensor([0], dtype=torch.int32)
    host.replace_frame(key, value, torch.zeros(1, 2, 2, 128), slot, slot + 1)
    assert host.launched() * 4 * 8 / (2 * per_frame) <= 1.25

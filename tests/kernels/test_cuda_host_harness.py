"""The host build finds what it is there to find: copies of the kernels with one deliberate mistake each."""

import host_build
import pytest
import torch
from host_build import HostError, Process
from host_ops import HostOps

from memflow_kernels import reference
from memflow_kernels.testing import LAYOUTS, budget, relative_error, states

# The copies hold only the kernel that the test calls, so that they compile quickly.
ONE_ATTENTION = [
    ("attention.cu", "async ? use(Kernel<T, 64, true>()) : use(Kernel<T, 64, false>())", "use(Kernel<T, 64, true>())"),
    ("attention.cu", "async ? use(Kernel<T, 128, true>()) : use(Kernel<T, 128, false>())", "MEMFLOW_UNSUPPORTED"),
    ("attention.cu", "return of_format(__half())", "return MEMFLOW_UNSUPPORTED"),
]
NEXT_TILES = "cp_async_wait<0>();\n        __syncthreads();  // the next tiles"
KEY_ROWS = "8 * n + lane / 16 * 8 + lane % 8"
VALUE_ROWS = "16 * k + lane / 8 % 2 * 8 + lane % 8"
ATTENTION_MISTAKES = {
    "none": None,
    "no barrier before a tile is loaded over": ("attention.cu", NEXT_TILES, NEXT_TILES.replace("__syncthreads();", "")),
    "no wait for the copies": ("attention.cu", NEXT_TILES, NEXT_TILES.replace("cp_async_wait<0>();", "")),
    "no barrier between tiles of queries": ("attention.cu", "__syncthreads();  // nobody reads this tile", "// nobody"),
    "a fragment of keys one row off": ("tiles.cuh", KEY_ROWS, KEY_ROWS.replace("lane % 8", "(lane + 1) % 8")),
    "a fragment of values one row off": ("tiles.cuh", VALUE_ROWS, VALUE_ROWS.replace("lane % 8", "(lane + 1) % 8")),
    "a row read past the end": ("tiles.cuh", "bool inside = row < count;", "bool inside = row <= count;"),
    "the end of a frame not masked": ("attention.cu", "if (count < BN) mask_keys<BN>(logits, count);", ""),
}
MEANS_MISTAKES = {
    "none": None,
    "no barrier before the last sum": ("means.cu", "  __syncthreads();\n", ""),
    "a token past the end": ("means.cu", "token < last; token += ROWS", "token <= last; token += ROWS"),
    "16 bytes at an odd address": ("means.cu", "if (aligned(x, dtype, head_dim))", "if (true)"),
    "half a warp at a collective": ("means.cu", "total[i] = warp_sum(", "if (threadIdx.x % 2) total[i] = warp_sum("),
}
SAYS = {  # what stops the run; the others give wrong numbers
    "a row read past the end": "cp.async reads out of bounds",
    "a token past the end": "heap-buffer-overflow",
    "16 bytes at an odd address": "misaligned address",
    "half a warp at a collective": "deadlock",
}


@pytest.fixture
def copy(host_library):
    """copy(sources, changes): the ops by a copy of csrc/ with `changes`."""
    processes = []

    def build(sources, changes):
        processes.append(Process(host_build.library(sources, changes)))
        return HostOps(processes[-1])

    yield build
    for process in processes:
        process.close()


def judge(mistake, run, right, allowed):
    """Without a mistake the result is right; with one it is wrong, or the run stops and says what was found."""
    if mistake in SAYS:
        with pytest.raises(HostError, match=SAYS[mistake]):
            run()
    else:
        error = relative_error(run(), right)
        assert (error <= allowed) == (mistake == "none"), f"relative error {error}"


@pytest.mark.parametrize("mistake", ATTENTION_MISTAKES)
def test_mistakes_in_attention(copy, mistake):
    change = ATTENTION_MISTAKES[mistake]
    ops = copy(("attention.cu", "combine.cu"), ONE_ATTENTION + [change] * (change is not None))
    query, key, value = (states(1, n, 2, 64, dtype=torch.bfloat16, seed=n, mean=0.5) for n in (260, 140, 140))
    arguments = (torch.tensor([[[0], [0]]], dtype=torch.int32), 70, 1, 0.1)
    right, _ = reference.memory_attention(*(x.double() for x in (query, key, value)), *arguments, None)
    judge(mistake, lambda: ops.memory_attention(query, key, value, *arguments)[0], right, budget(torch.bfloat16))


@pytest.mark.parametrize("mistake", MEANS_MISTAKES)
def test_mistakes_in_a_sum(copy, mistake):
    change = MEANS_MISTAKES[mistake]
    ops = copy(("means.cu",), [change] * (change is not None))
    key = states(1, 3 * 65, 2, 24, layout=LAYOUTS[-1] if "odd" in mistake else "dense", mean=1.0)
    right = reference.frame_means(key.double(), 65)
    judge(mistake, lambda: ops.frame_means(key, 65), right, budget(torch.float32))

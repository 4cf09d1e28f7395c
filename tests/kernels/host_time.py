"""What a launch costs the host, without a GPU: `python tests/kernels/host_time.py [triton | gluon]`.

A stand-in for the driver loads nothing and launches nothing; all that Triton and this package do before it is real. The
measure is an empty Triton kernel with as many arguments of the same kinds, launched as often as a call of
memory_attention launches: everything above it is this package's own.
"""

from __future__ import annotations

import json
import statistics
import sys
import time

import aot
import torch
import triton
import triton.language as tl
from aot_cases import FULL, numbers, states
from triton.experimental import gluon
from triton.runtime.jit import JITFunction

import memflow_kernels.triton as kernels
from memflow_kernels.triton import configs

ROUNDS, CALLS = 15, 40
FORWARD = {"triton": "forward_kernel", "gluon": "forward_sm90_kernel"}


class Utilities:
    """What Triton asks of a driver to load a kernel."""

    def load_binary(self, *arguments):
        return 0, 0, 32, 0, 1024

    def get_device_properties(self, device):
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}


class Driver(aot.Driver):
    """Loads and launches nothing, and says that it did."""

    utils = Utilities()
    launches = 0

    class launcher_cls:
        def __init__(self, *arguments):
            pass

        def __call__(self, *arguments):
            Driver.launches += 1


@triton.jit(do_not_specialize=[f"n{i}" for i in range(10)])
def empty_forward(
    t0, t1, t2, d0, d1, d2, d3, t3, t4, t5, t6, t7,
    scale, s0, s1, s2, s3, s4, s5, s6, s7, s8, n0, n1, n2, n3, n4, n5, n6, n7, n8, n9,
    C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, C3: tl.constexpr, C4: tl.constexpr,
    C5: tl.constexpr, C6: tl.constexpr, C7: tl.constexpr,
):  # fmt: skip
    """As many arguments as the forward's kernel."""


@gluon.jit(do_not_specialize=[f"n{i}" for i in range(10)])
def empty_gluon(
    d0, d1, d2, d3, d4, t0, t1, t2, t3, t4, scale, n0, n1, n2, n3, n4, n5, n6, n7, n8, n9,
    C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, C3: tl.constexpr,
):  # fmt: skip
    """As many arguments as the Gluon kernel."""


@triton.jit(do_not_specialize=[f"n{i}" for i in range(6)])
def empty_combine(
    t0, t1, t2, t3, n0, n1, n2, n3, n4, n5, C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, C3: tl.constexpr
):
    """As many arguments as the kernel that puts pieces together."""


def per_call(run) -> float:
    """Seconds of this process per call."""
    begin = time.process_time()
    for _ in range(CALLS):
        run()
    return (time.process_time() - begin) / CALLS


def measure(kernel: str) -> dict[str, float]:
    """By the kernel "triton" or "gluon": microseconds of a call of memory_attention and of as many empty launches.

    ratio: the median of their quotients. launches: how many they are.
    """
    triton.runtime.driver.set_active(Driver(aot.TARGETS["sm_90"]))
    configs._gpu_family = lambda index: "sm_90"
    configs._gpu_multiprocessors = lambda index: 132
    if kernel == "triton":
        configs.SPECIALISED = {"any": ()}
    torch.Tensor.data_ptr = lambda x: x.storage_offset() * x.element_size()
    allocated, allocate = {}, torch.empty

    def empty_tensor(shape, **options):  # a GPU's allocator takes a microsecond, a tensor without memory many
        kind = (shape, options["dtype"])
        if kind not in allocated:
            allocated[kind] = allocate(shape, **options)
        return allocated[kind]

    query, key, value = (states(frames * FULL) for frames in (3, 15, 15))
    frame_table, scale = numbers(1, 12, 3), 128**-0.5
    torch.empty = empty_tensor
    given = []
    launch = JITFunction.run

    def noted(self, *args, **options):
        constants = sum(parameter.is_constexpr for parameter in self.params)
        given.append((self.__name__, args[: len(self.params) - constants]))
        return launch(self, *args, **options)

    def attention():
        return kernels.memory_attention(query, key, value, frame_table, FULL, 6, scale, None)

    JITFunction.run = noted
    attention()
    JITFunction.run = launch
    arguments = dict(given)
    forward, combine = arguments[FORWARD[kernel]], arguments["combine_kernel"]
    launched, options = {
        "triton": (empty_forward, {**{f"C{i}": 16 for i in range(8)}, "num_warps": 8, "num_stages": 3}),
        "gluon": (empty_gluon, {**{f"C{i}": 16 for i in range(4)}, "num_warps": 4}),
    }[kernel]

    def empty():
        launched[(684,)](*forward, **options)
        empty_combine[(48, 8)](*combine, C0=128, C1=128, C2=128, C3=16)

    empty()
    Driver.launches = 0
    attention()
    launches = Driver.launches
    ratios, ours, theirs = [], [], []
    for _ in range(ROUNDS):  # in turns, so that a change of the machine's mood hits both
        a, b = per_call(attention), per_call(empty)
        ratios.append(a / b)
        ours.append(a)
        theirs.append(b)
    return {
        "attention_us": 1e6 * min(ours),
        "empty_us": 1e6 * min(theirs),
        "ratio": statistics.median(ratios),
        "launches": launches,
    }


if __name__ == "__main__":
    print(json.dumps(measure(*(sys.argv[1:] or ["triton"]))))

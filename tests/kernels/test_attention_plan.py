"""Launches of memory_attention are planned once per kind of call: what makes a kind, and what a plan must not hold."""

import gc
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

from memflow_kernels import reference
from memflow_kernels.backends import available_backends, implementation, interpreting
from memflow_kernels.testing import assert_close, draw, states

if available_backends()["triton"] is not None:
    pytest.skip(f"backend triton: {available_backends()['triton']}", allow_module_level=True)

from memflow_kernels.triton import configs, gluon
from memflow_kernels.triton.attention import planned

BASE = {
    "dtype": torch.float32, "queries": 18, "frames": 4, "heads": 2, "head_dim": 24, "batch": 1, "layout": "dense",
    "value_layout": "dense", "places": 2, "tokens_per_frame": 8, "candidate_frames": 3, "query_block": None,
    "shift": 0,
}  # fmt: skip
CHANGES = [
    {"dtype": torch.float16},
    {"queries": 19},
    {"frames": 5},
    {"heads": 3},
    {"head_dim": 32},
    {"batch": 2},
    {"layout": "sliced"},
    {"value_layout": "heads_first"},
    {"places": 1},
    {"places": None},
    {"tokens_per_frame": 4, "frames": 8},
    {"candidate_frames": 2},
    {"query_block": 17},
    {"shift": 1},  # of the pointers by one number: not at 16 bytes any more
]


@pytest.fixture(autouse=True)
def _device():
    torch.set_default_device(None if interpreting() else "cuda")
    planned.cache_clear()
    yield
    torch.set_default_device(None)


def arguments(**changes):
    """Tensors and numbers of a call like BASE but for `changes`."""
    of = {**BASE, **changes}
    tokens = of["frames"] * of["tokens_per_frame"]
    layouts = (of["layout"], of["layout"], of["value_layout"])
    tensors = []
    for seed, (length, layout) in enumerate(zip((of["queries"], tokens, tokens), layouts, strict=True)):
        x = states(of["batch"], length, of["heads"], of["head_dim"], dtype=of["dtype"], layout=layout, seed=seed)
        if of["shift"]:
            moved = torch.empty(x.numel() + of["shift"], dtype=x.dtype)[of["shift"] :].view(x.shape)
            x = moved.copy_(x)
        tensors.append(x)
    table = None
    if of["places"] is not None:
        blocks = [] if of["query_block"] is None else [-(-of["queries"] // of["query_block"])]
        shape = (of["batch"], of["heads"], *blocks, of["places"])
        table = draw(torch.randint, -1, of["candidate_frames"], shape, seed=0, dtype=torch.int32)
    return tensors, (table, of["tokens_per_frame"], of["candidate_frames"], 0.25, of["query_block"])


def check(tensors, sizes):
    actual = implementation("memory_attention", "triton")(*tensors, *sizes)
    expected = reference.memory_attention(*(x.double() for x in tensors), *sizes)
    assert_close(actual[0], expected[0], roundings=2)
    assert_close(actual[1], expected[1])


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_a_call_of_another_kind_has_a_plan_of_its_own(change, monkeypatch):
    """Descriptors are on: alignment and strides decide on them. Both calls, and each again on other tensors."""
    config = configs.Config({"BM": 16, "BN": 16}, descriptors=True)
    for kernel in configs.TABLE:
        if kernel.startswith("attention_forward"):
            monkeypatch.setitem(configs.TABLE, kernel, {"any": config})
    check(*arguments())
    check(*arguments(**change))
    assert planned.cache_info()[:2] == (0, 2)
    check(*arguments())
    check(*arguments(**change))
    assert planned.cache_info()[:2] == (2, 2)


def test_the_scale_is_no_part_of_a_kind():
    tensors, (*sizes, _scale, query_block) = arguments()
    for scale in (0.25, 0.5, -0.25, 0.0):
        check(tensors, (*sizes, scale, query_block))
    assert planned.cache_info()[:2] == (3, 1)


def layout_of(dtype=torch.bfloat16, tokens=4680, head_dim=128, aligned=True):
    return dtype, (1, tokens, 12, head_dim), (tokens * 12 * head_dim, 12 * head_dim, head_dim, 1), aligned


def call_on(device, query=None, incomplete=False):
    keys = layout_of(tokens=15 * 1560)
    return torch.device(device), query or layout_of(), keys, keys, (1, 12, 3), 1560, 6, None, incomplete


@pytest.mark.parametrize("family", ["sm_80", "sm_90"])
def test_devices_have_plans_of_their_own(monkeypatch, family):
    monkeypatch.setattr(configs, "_gpu_family", lambda index: family)
    monkeypatch.setattr(configs, "_gpu_multiprocessors", lambda index: (132, 78)[index])
    first, second = (planned(*call_on(f"cuda:{index}")) for index in range(2))
    assert first.grid != second.grid
    assert planned(*call_on("cuda:0")) is first
    incomplete = planned(*call_on("cuda:0", incomplete=True))
    assert incomplete.pieces is None and incomplete.kernel.__name__ == "forward_kernel"


@pytest.mark.skipif(not gluon.AVAILABLE, reason="this release of Triton has another Gluon")
def test_the_kernel_that_attends_is_part_of_the_plan(monkeypatch):
    monkeypatch.setattr(configs, "_gpu_family", lambda index: "sm_90")
    monkeypatch.setattr(configs, "_gpu_multiprocessors", lambda index: 132)
    kernels = [
        planned(*call_on("cuda:0", query)).kernel.__name__
        for query in (layout_of(), layout_of(aligned=False), layout_of(tokens=64), layout_of(torch.float32))
    ]
    assert kernels == ["forward_sm90_kernel", *["forward_kernel"] * 3]


def test_plans_keep_no_tensor_and_are_bounded():
    tensors, sizes = arguments()
    results = implementation("memory_attention", "triton")(*tensors, *sizes)
    alive = [weakref.ref(x) for x in (*tensors, sizes[0], *results)]
    del tensors, sizes, results
    gc.collect()
    assert planned.cache_info().currsize == 1
    assert [x() for x in alive] == [None] * 6
    assert planned.cache_info().maxsize <= 256


@pytest.mark.parametrize("kernel", ["triton", "gluon"])
def test_host_time(kernel):
    """Of a call, by an empty launch with as many arguments: 1.5 is the aim, the rest is for a machine that is busy."""
    if kernel == "gluon" and not gluon.AVAILABLE:
        pytest.skip("this release of Triton has another Gluon")
    command = [sys.executable, Path(__file__).with_name("host_time.py"), kernel]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["launches"] == 2
    assert found["attention_us"] / found["empty_us"] <= 1.8, found

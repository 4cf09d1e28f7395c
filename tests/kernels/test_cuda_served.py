"""On a GPU, the calls that the compiled kernels serve themselves: the head sizes, dtypes and sizes of real models."""

import pytest
import torch

from memflow_kernels import Pool, available_backends, memory_attention, qk_norm_rope_write, reference, use_backend
from memflow_kernels.cuda import coverage, extension
from memflow_kernels.testing import (
    LAYOUTS,
    AttentionCase,
    assert_close,
    attention_inputs,
    draw,
    poisoned_memory,
    states,
)

MISSING = available_backends()["cuda"]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(MISSING is not None, reason=f"backend cuda: {MISSING}")]
CASES = {
    case.name: case
    for case in (
        AttentionCase("frames of 24 tokens", 2, 37, 3, 64, 24, 9, 6, 3),
        AttentionCase("frames of 7 tokens", 1, 130, 2, 128, 7, 5, 4, 2),
        AttentionCase("frames of 1560 tokens", 1, 200, 2, 128, 1560, 5, 3, 1),
        AttentionCase("one query", 2, 1, 5, 64, 33, 4, 2, 1),
        AttentionCase("dense", 1, 129, 2, 128, 65, 3, 0, None),
    )
}
HALF = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def compiled():
    assert extension.unloadable() is None
    assert extension.not_compiled_for(torch.cuda.current_device()) is None
    torch.set_default_device("cuda")
    with use_backend("cuda"), poisoned_memory():
        yield
    torch.set_default_device(None)


def table(case: AttentionCase, blocks: int | None = None, places: int = 3) -> torch.Tensor:
    """Some frames twice, some places empty, and one head without any."""
    middle = () if blocks is None else (blocks,)
    shape = (case.batch, case.heads, *middle, places)
    chosen = draw(torch.randint, -1, max(case.candidate_frames, 1), shape, seed=1).int()
    chosen[0, 0] = -1
    return chosen


def compare(case: AttentionCase, dtype: torch.dtype, layout: str = "dense", frame_table=None, query_block=None) -> None:
    query, key, value = attention_inputs(case, dtype=dtype, layout=layout)
    sizes = (case.tokens_per_frame, case.candidate_frames, case.head_dim**-0.5, query_block)
    assert coverage.unserved("memory_attention", query) is None
    options = {"tokens_per_frame": case.tokens_per_frame, "candidate_frames": case.candidate_frames}
    options |= {"frame_table": frame_table, "query_block": query_block, "return_lse": True}
    out, lse = memory_attention(query, key, value, **options)
    wide = (query.double(), key.double(), value.double())
    expected, expected_lse = reference.memory_attention(*wide, frame_table, *sizes)
    assert_close(out, expected, roundings=2)
    assert_close(lse, expected_lse, dtype, roundings=2)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_served_attention(case, dtype):
    compare(case, dtype, frame_table=table(case) if case.candidate_frames else None)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_served_attention_in_any_layout(layout):
    case = CASES["frames of 24 tokens"]
    compare(case, torch.bfloat16, layout, table(case))


@pytest.mark.parametrize("query_block", [1, 16, 17, 64])
def test_served_attention_with_a_choice_per_block(query_block):
    case = CASES["frames of 24 tokens"]
    compare(case, torch.bfloat16, frame_table=table(case, -(-case.queries // query_block)), query_block=query_block)


@pytest.mark.parametrize("top_k", [1, 3, 6, 9])
def test_served_choice_and_attention(top_k):
    """The whole call as a model makes it; k = 9 is more than there are candidates."""
    case = CASES["frames of 24 tokens"]
    query, key, value = attention_inputs(case, dtype=torch.bfloat16)
    options = {"tokens_per_frame": 24, "candidate_frames": case.candidate_frames, "top_k": top_k}
    out = memory_attention(query, key, value, **options)
    with use_backend("torch"):
        expected = memory_attention(query, key, value, **options)
    assert_close(out, expected, roundings=3)


def test_served_forward_has_a_gradient():
    """The forward is compiled, the backward Triton's: one gradient, that of the specification."""
    case = CASES["frames of 24 tokens"]
    leaves = [x.requires_grad_() for x in attention_inputs(case, dtype=torch.bfloat16)]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    options = {"tokens_per_frame": 24, "candidate_frames": 6, "frame_table": table(case)}
    grads = torch.autograd.grad(memory_attention(*leaves, **options).double().square().sum(), leaves)
    with use_backend("torch"):
        expected = torch.autograd.grad(memory_attention(*wide, **options).square().sum(), wide)
    for grad, exact in zip(grads, expected, strict=True):
        assert_close(grad, exact, roundings=4)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
@pytest.mark.parametrize(("heads", "head_dim"), [(12, 128), (3, 64), (40, 128), (2, 6)], ids=str)
def test_served_write(heads, head_dim, dtype):
    """The sizes of the 1.3B and the 14B model, and odd ones: query, keys, values and means are those of torch."""
    rows, cols, frames, slots = 4, 6, 2, 5
    query, key, value = (states(2, frames * 24, heads, head_dim, dtype=dtype, seed=seed) for seed in range(3))
    weight = states(1, 1, heads, head_dim, dtype=dtype, seed=4, mean=1.0).flatten()
    place = {"weight_q": weight, "weight_k": weight, "eps": 1e-6, "grid": (rows, cols)}
    place |= {"start_frame": torch.tensor(1000), "slots": torch.tensor([3, -1], dtype=torch.int32)}
    results = []
    for name in ("cuda", "torch"):
        pool = Pool.zeros(2, slots, 24, heads, head_dim, dtype=dtype, device="cuda")
        with use_backend(name):
            new_query, query_mean = qk_norm_rope_write(query, key, value, pool=pool, query_mean=True, **place)
        results.append((new_query, *pool, query_mean))
    for mine, expected in zip(*results, strict=True):
        assert_close(mine, expected, dtype, roundings=2)

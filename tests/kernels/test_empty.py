"""No frames yet, no queries at all: results of the right shape, (0, -inf) where there is no key, gradients of 0."""

import pytest
import torch

from memflow_kernels import memory_attention, merge_attention, select_frames
from memflow_kernels.testing import states

pytestmark = pytest.mark.usefixtures("backend")
SIZES = {"tokens_per_frame": 3}


def attend(queries, frames, dtype=torch.float32, **options):
    leaves = [
        states(2, n, 2, 8, dtype=dtype, seed=s).requires_grad_()
        for s, n in enumerate((queries, 3 * frames, 3 * frames))
    ]
    out, lse = memory_attention(*leaves, return_lse=True, **SIZES, **options)
    grads = torch.autograd.grad(out.float().sum() + lse.masked_fill(lse == -torch.inf, 0.0).sum(), leaves)
    assert out.shape == leaves[0].shape
    assert out.dtype == dtype
    assert lse.shape == (2, 2, queries)
    for leaf, grad in zip(leaves, grads, strict=True):
        assert grad.shape == leaf.shape
        assert not grad.any()
    return out, lse


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"candidate_frames": 0, "top_k": 1}, {"frame_table": torch.full((2, 2, 3), -1, dtype=torch.int32)}],
    ids=["dense", "top_k", "table"],
)
def test_an_empty_memory(options, dtype):
    out, lse = attend(4, 0, dtype, **options)
    assert not out.any()
    assert torch.equal(lse, torch.full_like(lse, -torch.inf))


def test_candidates_none_of_which_is_chosen_and_nothing_else():
    out, lse = attend(4, 2, candidate_frames=2, frame_table=torch.full((2, 2, 1), -1, dtype=torch.int32))
    assert not out.any()
    assert torch.equal(lse, torch.full_like(lse, -torch.inf))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"candidate_frames": 3, "top_k": 1},
        {"candidate_frames": 3, "top_k": 1, "query_block": 2},
        {"candidate_frames": 3, "frame_table": torch.zeros(2, 2, 1, dtype=torch.int32)},
        {"candidate_frames": 3, "frame_table": torch.zeros(2, 2, 0, 1, dtype=torch.int32), "query_block": 2},
    ],
    ids=["dense", "top_k", "top_k per block", "table", "table per block"],
)
def test_no_queries(options):
    attend(0, 4, **options)


def test_no_queries_and_no_frames():
    attend(0, 0)


def test_merging_an_empty_memory_changes_nothing():
    """What a stream does before it remembers anything: its window, merged with the attention over no frame."""
    query, key, value = (states(1, n, 2, 8, seed=s) for s, n in enumerate((4, 6, 6)))
    window = memory_attention(query, key, value, return_lse=True, **SIZES)
    memory = memory_attention(query, key[:, :0], value[:, :0], return_lse=True, **SIZES)
    out, lse = merge_attention(*window, *memory)
    assert torch.equal(out, window[0])
    torch.testing.assert_close(lse, window[1], rtol=0, atol=1e-6)


def test_merging_no_queries():
    out, lse = torch.zeros(1, 0, 2, 8, requires_grad=True), torch.zeros(1, 2, 0, requires_grad=True)
    merged, merged_lse = merge_attention(out, lse, out, lse)
    assert merged.shape == out.shape
    assert merged_lse.shape == lse.shape
    assert torch.autograd.grad(merged.sum() + merged_lse.sum(), (out, lse))[0].shape == out.shape


def test_a_mean_of_no_queries_is_refused():
    with pytest.raises(ValueError, match=r"query must be .* sizes of at least 1, got shape \[1, 0, 2, 8\]"):
        select_frames(torch.zeros(1, 0, 2, 8), torch.zeros(1, 3, 2, 8), 1)

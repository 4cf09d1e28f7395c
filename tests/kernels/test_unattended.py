"""What is not attended to does not count: frames that no head chose and text that is masked may hold NaN or infinity.

A weight of 0 times NaN is NaN, so that no backend may hide by multiplying.
"""

import pytest
import torch

from memflow_kernels import memory_attention, prompt_relevance, select_frames
from memflow_kernels.testing import states

pytestmark = pytest.mark.usefixtures("backend")

N = 4
POISON = [torch.nan, torch.inf, -torch.inf, 3e38]
TABLES = {
    "one table for all": ([[[1, 2], [1, 2]]], None),
    "per head": ([[[1, 2], [2, 1]]], None),
    "empty places": ([[[1, -1], [-1, -1]]], None),
    "named twice": ([[[1, 1], [2, -1]]], None),
    "per block": ([[[[1, 2], [-1, 2]], [[2, -1], [1, 1]]]], 4),
}


def attention_and_gradients(poison, numbers, query_block, through_lse):
    """out, lse and gradients over 5 frames; frame 0, which no table names, holds the poison."""
    query, key, value = (states(1, n, 2, 16, seed=s) for s, n in enumerate((6, 5 * N, 5 * N)))
    if poison is not None:
        key[:, :N] = value[:, :N] = poison
    leaves = [x.requires_grad_() for x in (query, key, value)]
    table = torch.tensor(numbers, dtype=torch.int32)
    options = {"tokens_per_frame": N, "candidate_frames": 3, "frame_table": table, "query_block": query_block}
    out, lse = memory_attention(*leaves, return_lse=True, **options)
    loss = out.square().sum() + (lse.sum() if through_lse else 0)
    return out, lse, *torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("through_lse", [False, True], ids=["out", "lse"])
@pytest.mark.parametrize("poison", POISON, ids=str)
@pytest.mark.parametrize("name", TABLES)
def test_frames_that_nobody_chose(name, poison, through_lse):
    numbers, query_block = TABLES[name]
    clean, dirty = (attention_and_gradients(x, numbers, query_block, through_lse) for x in (None, poison))
    for a, b in zip(clean, dirty, strict=True):
        assert torch.isfinite(b).all()
        assert torch.equal(a, b)
    assert not dirty[3][:, :N].any()
    assert not dirty[4][:, :N].any()


def test_a_frame_that_one_head_chose_does_not_touch_the_others():
    """Frame 0 is chosen by head 0 alone, which is lost; head 1 is as if it were clean."""
    clean, dirty = (attention_and_gradients(x, [[[0, 2], [1, 2]]], None, False) for x in (None, torch.nan))
    for x, heads in ((0, 2), (1, 1), (2, 2), (3, 2), (4, 2)):
        assert torch.equal(clean[x].select(heads, 1), dirty[x].select(heads, 1))
    assert dirty[0][:, :, 0].isnan().all()
    assert dirty[2][:, :, 0].isnan().all()


def test_a_block_of_queries_that_chose_a_frame_does_not_touch_the_others():
    numbers = [[[[0, 2], [1, 2]], [[0, 2], [1, 2]]]]
    clean, dirty = (attention_and_gradients(x, numbers, 4, False) for x in (None, torch.nan))
    assert dirty[2][:, :4].isnan().all()
    assert torch.equal(clean[2][:, 4:], dirty[2][:, 4:])
    assert torch.equal(clean[3][:, N : 2 * N], dirty[3][:, N : 2 * N])


@pytest.mark.parametrize("poison", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("aggregate", ["mean", "softmax", "token"])
def test_masked_text(aggregate, poison):
    text, key = states(2, 5, 2, 16), states(2, 3 * N, 2, 16, seed=1)
    mask = torch.tensor([[True] * 3 + [False] * 2, [False, True, False, True, True]])
    results = []
    for dirty in (False, True):
        words = text.clone()
        if dirty:
            words[~mask] = poison
        leaves = [words.requires_grad_(), key.clone().requires_grad_()]
        score = prompt_relevance(*leaves, tokens_per_frame=N, text_mask=mask, aggregate=aggregate)
        results.append((score, *torch.autograd.grad(score[..., 0].sum(), leaves)))
    for a, b in zip(*results, strict=True):
        assert torch.isfinite(b).all()
        assert torch.equal(a, b)
    assert not results[1][1][~mask].any()


@pytest.mark.parametrize("nan", [torch.nan, -torch.nan], ids=["nan", "-nan"])
def test_scores_that_are_not_numbers_count_as_the_largest(nan):
    """As in a sort, of equal ones the lower index; every table names frames that exist."""
    query = torch.ones(1, 2, 1, 4)
    means = torch.tensor([-torch.inf, 1.0, nan, torch.inf, -0.0, nan, 0.0]).view(1, 7, 1, 1).repeat(1, 1, 1, 4)
    assert select_frames(query, means, 1).tolist() == [[[2]]]
    assert select_frames(query, means, 3).tolist() == [[[2, 3, 5]]]
    assert select_frames(query, means, 9).tolist() == [[[0, 1, 2, 3, 4, 5, 6]]]
    valid = torch.tensor([[True, True, False, True, True, True, True]])
    assert select_frames(query, means, 2, valid=valid).tolist() == [[[3, 5]]]
    query[0, 0, 0, 0] = nan
    assert select_frames(query, means, 3).tolist() == [[[0, 1, 2]]]


def test_numbers_that_are_not_numbers_come_through():
    """A query that is NaN gives NaN, and no other query does."""
    query, key, value = (states(1, n, 2, 8, seed=s) for s, n in enumerate((3, 4 * N, 4 * N)))
    query[0, 1, 0, 5] = torch.nan
    table = torch.tensor([[[0, 2], [1, -1]]], dtype=torch.int32)
    for options in ({}, {"candidate_frames": 3, "frame_table": table}):
        out, lse = memory_attention(query, key, value, tokens_per_frame=N, return_lse=True, **options)
        assert out.isnan().all(-1)[0].tolist() == [[False, False], [True, False], [False, False]]
        assert lse.isnan()[0].tolist() == [[False, True, False], [False, False, False]]


def test_logits_that_overflow_are_not_taken_for_an_empty_set():
    """Their log-sum-exp is NaN: +inf is the mark of a set without keys, and a merge would drop it."""
    query, key, value = (states(1, n, 1, 8, seed=s).abs() for s, n in enumerate((2, 2 * N, 2 * N)))
    key[0, 0] = torch.inf
    out, lse = memory_attention(query, key, value, tokens_per_frame=N, return_lse=True)
    assert lse.isnan().all()
    assert out.isnan().all()


@pytest.mark.parametrize("frames", [2, 9, 33, *(pytest.param(n, marks=pytest.mark.slow) for n in (5, 6, 17, 20))])
def test_identical_frames_tie(frames):
    """A bank may hold copies: the scores of equal frames must be equal to the last bit, wherever they stand."""
    for head_dim in (4, 24, 64, 128):
        for seed in range(3):
            query, mean = states(2, 24, 3, head_dim, seed=seed), states(2, 1, 3, head_dim, seed=seed + 9)
            means = mean.expand(2, frames, 3, head_dim).contiguous()
            for query_block in (None, 5):
                table = select_frames(query, means, 2, query_block=query_block)
                assert torch.equal(table, torch.arange(2, dtype=torch.int32).expand_as(table))

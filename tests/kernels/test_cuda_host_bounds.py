"""Single lines of the CUDA kernels that other sizes do not reach, run on the CPU: each test names what it guards."""

import pytest
import torch

from memflow_kernels import reference
from memflow_kernels.testing import assert_close, states


def test_a_tile_whose_first_share_begins_before_the_share_that_rounding_names(host):
    """5 tiles of 10 units in 11 shares: the quotient that finds the first sharer of a tile is one too low for some."""
    query, key, value = (states(1, n, 5, 64, dtype=torch.bfloat16, seed=s) for s, n in enumerate((100, 640, 640)))
    with host.machine(multiprocessors=11):
        out, lse = host.memory_attention(query, key, value, None, 64, 0, 0.1)
    right, right_lse = reference.memory_attention(*(x.double() for x in (query, key, value)), None, 64, 0, 0.1, None)
    assert_close(out, right, roundings=3)
    assert_close(lse, right_lse)


@pytest.mark.parametrize("query_block", [257, 300])
def test_a_part_of_a_segment_ends_with_the_segment(host, query_block):
    """More than 256 queries are summed in parts, which need not divide them: the next block's first query is huge."""
    query, means = states(1, 2 * query_block, 1, 24), states(1, 6, 1, 24, seed=1)
    query[:, query_block] = -1e4 * means[:, 0]
    table = host.select_frames(query, means, 2, None, query_block)
    assert torch.equal(table, reference.select_frames(query.double(), means.double(), 2, None, query_block))


@pytest.mark.parametrize("scale", [-0.3, 0.0])
@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.bfloat16, 64), (torch.float16, 128)], ids=str)
def test_the_sign_of_the_scale_on_tensor_cores(host, dtype, head_dim, scale):
    text, key = states(1, 20, 2, head_dim, dtype=dtype), states(1, 3 * 24, 2, head_dim, dtype=dtype, seed=1)
    expected = reference.prompt_relevance_softmax(text.double(), key.double(), None, 24, scale)
    assert_close(host.prompt_relevance_softmax(text, key, None, 24, scale), expected)


@pytest.mark.parametrize("beyond", [2, 3, 2**30], ids=str)
def test_frames_behind_the_candidates_are_not_gathered(host, beyond):
    key, value = (states(1, 4 * 7, 2, 16, seed=s) for s in (0, 1))
    wild = torch.tensor([[[beyond, 1], [0, beyond]]], dtype=torch.int32)
    tame = torch.tensor([[[-1, 1], [0, -1]]], dtype=torch.int32)
    for a, b in zip(
        host.gather_frames(key, value, wild, 7, 2), host.gather_frames(key, value, tame, 7, 2), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("nan", [torch.nan, -torch.nan], ids=["nan", "-nan"])
def test_nan_counts_as_the_largest_score(host, nan):
    """With either sign: what a processor makes of inf - inf has one, and its bits alone would sort it last."""
    query = torch.ones(1, 2, 1, 4)
    means = torch.tensor([-torch.inf, 1.0, nan, torch.inf, nan]).view(1, 5, 1, 1).repeat(1, 1, 1, 4)
    assert host.select_frames(query, means, 1).tolist() == [[[2]]]
    assert host.select_frames(query, means, 3).tolist() == [[[2, 3, 4]]]


@pytest.mark.parametrize("slot, source", [((0, 2), (1, 0)), ((2, 1), (0, 2))])
@pytest.mark.parametrize("tokens", [5, 300])
def test_every_batch_row_moves_in_its_own_keys_and_values(host, tokens, slot, source):
    """300: a head's frame takes more than one block."""
    pool = [states(2, n, 3, 32, layout="heads_first", seed=n) for n in (3 * tokens, 3 * tokens + 1, 3)]
    pool[1] = pool[1][:, : 3 * tokens].contiguous()  # strides of its own
    expected = [part.clone() for part in pool]
    numbers = [torch.tensor(x, dtype=torch.int32) for x in (slot, source)]
    reference.replace_frame(*expected, *numbers)
    host.replace_frame(*pool, *numbers)
    assert all(torch.equal(part, right) for part, right in zip(pool, expected, strict=True))

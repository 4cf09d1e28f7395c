"""memory_attention by the CUDA kernels, run on the CPU, tensor cores and asynchronous copies included."""

import pytest
import torch
from host_ops import States
from hypothesis import given, settings
from hypothesis import strategies as st

from memflow_kernels import reference
from memflow_kernels.testing import LAYOUTS, assert_close, draw, relative_error, states

KERNELS = settings(settings.get_profile("kernels"), max_examples=15)
DTYPES = (torch.bfloat16, torch.float16)


def check(host, inputs, table, tokens, candidates, scale=0.1, query_block=None, with_lse=True):
    """Within 1.5 times the error of the torch backend in the same format; the log-sum-exp within 1e-5."""
    out, lse = host.memory_attention(*inputs, table, tokens, candidates, scale, query_block, with_lse)
    arguments = (table, tokens, candidates, scale, query_block)
    right, right_lse = reference.memory_attention(*(x.double() for x in inputs), *arguments)
    by_torch, _ = reference.memory_attention(*inputs, *arguments)
    assert relative_error(out, right) <= 1.5 * relative_error(by_torch, right)
    if with_lse:
        assert_close(lse, right_lse, dtype=torch.float32)


def inputs_of(batch, queries, heads, head_dim, tokens, dtype=torch.bfloat16, layout="dense", seed=0):
    sizes = ((queries, 0.0), (tokens, 0.0), (tokens, 1.0))
    options = {"dtype": dtype, "layout": layout}
    return [
        states(batch, n, heads, head_dim, seed=3 * seed + i, mean=mean, **options) for i, (n, mean) in enumerate(sizes)
    ]


def table_of(candidates, *shape, seed=0):
    return draw(torch.randint, -1, candidates, shape, seed=seed, dtype=torch.int32)


@KERNELS
@given(
    st.integers(1, 2),
    st.integers(1, 140),
    st.integers(1, 2),
    st.integers(1, 70),
    st.integers(1, 4),
    st.integers(0, 4),
    st.integers(0, 3),
    st.sampled_from(DTYPES),
    st.sampled_from(LAYOUTS),
    st.sampled_from([0.1, -0.2, 0.0]),
    st.integers(0, 1000),
)
def test_random_cases(host, batch, queries, heads, tokens, frames, candidates, places, dtype, layout, scale, seed):
    """Tables with empty places, with frames named twice, of no place at all; frames of any length."""
    candidates = min(candidates, frames)
    inputs = inputs_of(batch, queries, heads, 64, frames * tokens, dtype, layout, seed)
    table = table_of(candidates, batch, heads, places, seed=seed)
    check(host, inputs, table, tokens, candidates, scale, with_lse=seed % 2 == 0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.bfloat16, 128), (torch.float16, 128), (torch.float16, 64)])
def test_every_kernel_in_every_layout(host, layout, dtype, head_dim):
    inputs = inputs_of(1, 133, 2, head_dim, 5 * 70, dtype, layout)
    check(host, inputs, torch.tensor([[[2, 0], [-1, 1]]], dtype=torch.int32), 70, 3)


@pytest.mark.parametrize("layout", ["dense", "padded"])
@pytest.mark.parametrize("query_block", [None, 7])
def test_dense(host, layout, query_block):
    check(host, inputs_of(2, 20, 1, 64, 3 * 57, layout=layout), None, 57, 0, query_block=query_block)


@pytest.mark.parametrize("multiprocessors", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("queries", [130, 260])
def test_every_division_of_the_work(host, multiprocessors, queries):
    """Whole rounds, tiles that are left over and cut into shares, fewer tiles than multiprocessors."""
    inputs = inputs_of(1, queries, 2, 64, 5 * 330, seed=multiprocessors)
    table = torch.tensor([[[0, 2], [1, -1]]], dtype=torch.int32)
    with host.machine(multiprocessors):
        check(host, inputs, table, 330, 3)


@pytest.mark.parametrize("queries", [130, 260])
def test_shares_without_a_log_sum_exp(host, queries):
    inputs = inputs_of(1, queries, 2, 64, 5 * 330)
    with host.machine(5):
        check(host, inputs, None, 330, 0, with_lse=False)


def test_a_share_that_weighs_nothing(host):
    """One frame's logits lie so far above the others' that the sum of all is that of its share alone."""
    inputs = inputs_of(1, 130, 2, 64, 5 * 330)
    inputs[0][..., 0], inputs[1][..., 0] = 8.0, -8.0
    inputs[1][:, 330:660, :, 0] = 8.0
    for multiprocessors in (3, 5):
        with host.machine(multiprocessors):
            check(host, inputs, None, 330, 0, scale=10.0)


def test_the_order_of_blocks_does_not_change_a_bit(host):
    inputs = inputs_of(1, 130, 2, 64, 5 * 330)
    results = []
    for last_block_first in (False, True):
        with host.machine(last_block_first=last_block_first):
            results.append(host.memory_attention(*inputs, None, 330, 0, 0.1))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("query_block", [1, 50, 128, 150, 1000])
def test_every_block_of_queries_has_a_table_of_its_own(host, query_block):
    inputs = inputs_of(1, 4 if query_block == 1 else 170, 2, 64, 4 * 20)
    blocks = -(-inputs[0].shape[1] // query_block)
    check(host, inputs, table_of(3, 1, 2, blocks, 2), 20, 3, query_block=query_block)


def test_no_key_gives_zero_and_minus_infinity(host):
    inputs = inputs_of(1, 5, 2, 64, 2 * 9)
    out, lse = host.memory_attention(*inputs, torch.tensor([[[0, 1], [-1, -1]]], dtype=torch.int32), 9, 2, 0.1)
    assert torch.equal(out[:, :, 1], torch.zeros_like(out[:, :, 1]))
    assert torch.equal(lse[:, 1], torch.full((1, 5), -torch.inf))
    assert torch.isfinite(out).all()
    assert torch.isfinite(lse[:, 0]).all()
    out, lse = host.memory_attention(*inputs, torch.zeros(1, 2, 0, dtype=torch.int32), 9, 2, 0.1)
    assert not out.any()
    assert torch.equal(lse, torch.full((1, 2, 5), -torch.inf))


def test_places_outside_the_candidates_are_empty(host):
    inputs = inputs_of(1, 5, 1, 64, 3 * 9)
    wild, tame = (torch.tensor([[[7, 1, place, 2]]], dtype=torch.int32) for place in (-5, -1))
    results = [host.memory_attention(*inputs, table, 9, 2, 0.1) for table in (wild, tame.masked_fill(tame > 1, -1))]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("layout", ["dense", "padded"])
def test_frames_that_nobody_chose_are_not_read(host, layout):
    inputs = inputs_of(1, 6, 2, 64, 5 * 70, layout=layout)
    table = torch.tensor([[[1, 1], [-1, 1]]], dtype=torch.int32)
    clean = host.memory_attention(*inputs, table, 70, 3, 0.1)
    for x in inputs[1:]:
        x[:, :70] = x[:, 140:210] = torch.nan
    assert all(torch.equal(a, b) for a, b in zip(clean, host.memory_attention(*inputs, table, 70, 3, 0.1), strict=True))


def test_numbers_that_are_not_numbers_come_through(host):
    inputs = inputs_of(1, 3, 1, 64, 9)
    inputs[0][0, 1, 0, 5] = torch.nan
    out, lse = host.memory_attention(*inputs, None, 9, 0, 0.1)
    assert out[0, 1].isnan().all()
    assert lse[0, 0].isnan().tolist() == [False, True, False]
    assert torch.isfinite(out[:, [0, 2]]).all()


def test_what_is_not_served_is_refused(host):
    assert host.call("memory_attention_supported", 1, 128) == 1
    assert host.call("memory_attention_supported", 0, 128) == 0
    assert host.call("memory_attention_supported", 2, 96) == 0
    inputs = inputs_of(1, 3, 1, 64, 9)
    with pytest.raises(RuntimeError, match="memory_attention: error 1"):
        host.run("memory_attention", *map(States, inputs), 1, None, 1, 3, 1, 9, 1, 64, 1, 1, 0, 0.1, *[None] * 4)
    for inputs in (inputs_of(1, 3, 1, 64, 9, torch.float32), inputs_of(1, 3, 1, 80, 9)):
        with pytest.raises(NotImplementedError, match="memory_attention: unsupported"):
            host.memory_attention(*inputs, None, 9, 0, 0.1)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_full_frames(host, dtype, head_dim):
    """1560 tokens per frame, shares of the work on 5 multiprocessors."""
    inputs = inputs_of(1, 200, 2, head_dim, 5 * 1560, dtype, "fused")
    with host.machine(multiprocessors=5):
        check(host, inputs, torch.tensor([[[0, 2], [1, -1]]], dtype=torch.int32), 1560, 3, head_dim**-0.5)

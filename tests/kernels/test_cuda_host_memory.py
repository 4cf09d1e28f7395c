"""The memory-bound CUDA kernels, run on the CPU: frame_means, select_frames, replace_frame, gather_frames."""

import loops
import pytest
import torch
from host_ops import run_of
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import cases

from memflow_kernels import reference
from memflow_kernels.testing import LAYOUTS, assert_close, draw, states

KERNELS = settings(settings.get_profile("kernels"), max_examples=20)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_DIMS = (1, 3, 7, 8, 20, 24, 64, 128)  # rows of 16 bytes and others
CASES = cases(head_dims=HEAD_DIMS, dtypes=DTYPES)


@KERNELS
@given(CASES)
def test_frame_means_equal_the_loop(host, case):
    mean = host.frame_means(case.key(), case.tokens_per_frame)
    assert_close(mean, torch.from_numpy(loops.frame_means(case.key(), case.tokens_per_frame)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("tokens", "head_dim"), [(65, 24), (300, 20)])
def test_frames_longer_than_a_block(host, layout, tokens, head_dim):
    key = states(1, 2 * tokens, 2, head_dim, dtype=torch.bfloat16, layout=layout, mean=1.0)
    assert_close(host.frame_means(key, tokens), key.double().unflatten(1, (2, tokens)).mean(2))


@KERNELS
@given(CASES, st.integers(1, 8), st.booleans(), st.sampled_from([None, 1, 2, 3, 9]))
def test_select_frames_keeps_the_best(host, case, top_k, some_invalid, query_block):
    query, means = case.query(), reference.frame_means(case.key(), case.tokens_per_frame)
    valid = draw(torch.rand, case.batch, case.frames, seed=case.seed) < 0.6 if some_invalid else None
    table = host.select_frames(query, means, top_k, valid, query_block)
    expected = reference.select_frames(query.double(), means.double(), top_k, valid, query_block)
    assert torch.equal(table, expected)


@KERNELS
@given(st.integers(0, 1000), st.integers(1, 8), st.booleans())
def test_ties_go_to_the_lower_index(host, seed, top_k, some_invalid):
    query = draw(torch.randint, -1, 2, (2, 4, 3, 2), seed=seed).float()
    means = draw(torch.randint, -1, 2, (2, 7, 3, 2), seed=seed + 1).float()
    valid = draw(torch.rand, 2, 7, seed=seed + 2) < 0.5 if some_invalid else None
    expected = loops.best_frames(loops.scores(query, means), top_k, valid)
    assert host.select_frames(query, means, top_k, valid).tolist() == expected


@pytest.mark.parametrize(("queries", "frames", "head_dim"), [(700, 5, 64), (7, 40, 24), (3, 70, 256)])
def test_select_from_many(host, queries, frames, head_dim):
    """More queries than one block sums up, more frames than a warp has lanes, more channels than lanes."""
    query = states(2, queries, 2, head_dim, dtype=torch.bfloat16, layout="fused")
    means = states(2, frames, 2, head_dim, layout="heads_first", seed=1)
    expected = reference.select_frames(query.double(), means.double(), 4, None, None)
    assert torch.equal(host.select_frames(query, means, 4), expected)


@pytest.mark.parametrize("query_block", [None, 3])
def test_select_from_a_known_mean_does_not_read_the_queries(host, query_block):
    query, means = states(2, 8, 3, 24), states(2, 6, 3, 24, seed=1)
    blocks = query.split(query_block or 8, 1)
    query_mean = torch.stack([block.mean(1) for block in blocks], 1)
    unknown = torch.full_like(query, torch.nan)
    table = host.select_frames(unknown, means, 2, None, query_block, query_mean=query_mean)
    assert torch.equal(table, host.select_frames(query, means, 2, None, query_block))


def test_scores_that_are_not_numbers(host):
    """Every table is a choice of frames that exist, whatever the numbers are."""
    query = torch.ones(1, 2, 1, 4)
    means = torch.tensor([-torch.inf, 1.0, torch.nan, torch.inf, -0.0, 0.0]).view(1, 6, 1, 1).repeat(1, 1, 1, 4)
    assert host.select_frames(query, means, 3).tolist() == [[[1, 2, 3]]]
    assert host.select_frames(query, means, 9).tolist() == [[[0, 1, 2, 3, 4, 5]]]


@pytest.mark.parametrize(("tokens", "layout"), [(60, "heads_first"), (23, "fused"), (130, "heads_first")])
def test_replace_frame_moves_all_of_a_frame(host, tokens, layout):
    """More than a block copies at a time, and not a multiple of it."""
    pool = pool_of(1, 3, tokens, 2, 64, torch.float32, layout)
    expected = [part.clone() for part in pool]
    numbers = torch.tensor([1], dtype=torch.int32), torch.tensor([2], dtype=torch.int32)
    reference.replace_frame(*expected, *numbers)
    host.replace_frame(*pool, *numbers)
    assert all(map(torch.equal, pool, expected))


def pool_of(batch, slots, tokens, heads, head_dim, dtype, layout):
    parts = [states(batch, slots * tokens, heads, head_dim, dtype=dtype, layout=layout, seed=seed) for seed in (0, 1)]
    return [*parts, states(batch, slots, heads, head_dim, layout="heads_first", seed=2)]


@KERNELS
@given(CASES, st.data())
def test_replace_frame_moves_one_frame_per_row(host, case, data):
    """In any layout; slots outside the pool, and what lies between the rows of a view, are left alone."""
    pool = pool_of(case.batch, case.frames, case.tokens_per_frame, case.heads, case.head_dim, case.dtype, case.layout)
    before = [run_of(part).clone() for part in pool]
    numbers = st.lists(st.integers(-2, case.frames), min_size=case.batch, max_size=case.batch)
    slot, source = data.draw(numbers), data.draw(numbers)
    host.replace_frame(*pool, torch.tensor(slot, dtype=torch.int32), torch.tensor(source, dtype=torch.int32))
    after = [run_of(part).clone() for part in pool]
    for part, memory in zip(pool, before, strict=True):
        run_of(part).copy_(memory)
    inside = range(case.frames)
    chosen = [pair if pair[0] in inside and pair[1] in inside else (-1, -1) for pair in zip(slot, source, strict=True)]
    reference.replace_frame(*pool, *torch.tensor(chosen, dtype=torch.int32).T)
    for part, memory in zip(pool, after, strict=True):
        assert torch.equal(run_of(part), memory)


@KERNELS
@given(CASES, st.integers(0, 6), st.integers(0, 4))
def test_gather_frames_puts_the_choice_in_front(host, case, candidate_frames, places):
    key, value = case.key(), case.value()
    candidates, tokens = min(candidate_frames, case.frames), case.tokens_per_frame
    table = draw(torch.randint, -1, max(candidates, 0), (case.batch, case.heads, places), seed=case.seed)
    packed = host.gather_frames(key, value, table.int(), tokens, candidates)
    for source, result in zip((key, value), packed, strict=True):
        frames = source.unflatten(1, (-1, tokens))
        for b in range(case.batch):
            for h in range(case.heads):
                kept = table[b, h].tolist()
                parts = [frames[b, f, :, h] if f >= 0 else torch.zeros_like(frames[b, 0, :, h]) for f in kept]
                parts += list(frames[b, candidates:, :, h])
                expected = torch.cat(parts) if parts else result[b, :, h]
                assert torch.equal(result[b, :, h], expected)


def test_sizes_that_make_no_sense_are_refused(host):
    x = states(1, 6, 2, 8)
    with pytest.raises(RuntimeError, match="frame_means: error 1"):
        host.run("frame_means", x, 0, 1, 2, 0, 2, 8, torch.zeros(32), None)
    with pytest.raises(NotImplementedError, match="select_frames: unsupported"):
        host.select_frames(states(1, 2, 1, 264), states(1, 3, 1, 264), 2)

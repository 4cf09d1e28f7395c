import loops
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import cases

from memflow_kernels import frame_means, select_frames
from memflow_kernels.testing import draw, poisoned_memory, states

KERNELS = settings.get_profile("kernels")
BACKENDS = pytest.mark.usefixtures("backend")


@BACKENDS
@KERNELS
@given(cases(), st.integers(1, 8), st.booleans())
def test_keeps_the_best_frames(case, top_k, some_invalid):
    query, means = case.query(), frame_means(case.key(), case.tokens_per_frame)
    valid = draw(torch.rand, case.batch, case.frames, seed=case.seed) < 0.6 if some_invalid else None
    with poisoned_memory():
        table = select_frames(query, means, top_k, valid=valid)
    assert table.dtype == torch.int32
    assert table.shape == (case.batch, case.heads, min(top_k, case.frames))
    score = loops.scores(query, means)
    slack = 1e-5 * abs(score).max()  # two scores closer than float32 can tell may come in either order
    for b, rows in enumerate(table.tolist()):
        usable = [f for f in range(case.frames) if valid is None or bool(valid[b, f])]
        for h, row in enumerate(rows):
            kept = [f for f in row if f >= 0]
            assert row == sorted(set(kept)) + [-1] * (len(row) - len(kept))
            assert len(kept) == min(top_k, len(usable))
            assert set(kept) <= set(usable)
            dropped = [score[b, h, f] for f in usable if f not in kept]
            if kept and dropped:
                assert min(score[b, h, f] for f in kept) >= max(dropped) - slack


@BACKENDS
@KERNELS
@given(cases(dtypes=(torch.float32, torch.float64)), st.integers(1, 8), st.integers(1, 9), st.booleans())
def test_every_block_of_queries_chooses_for_itself(case, top_k, query_block, some_invalid):
    query, means = case.query(), frame_means(case.key(), case.tokens_per_frame)
    valid = draw(torch.rand, case.batch, case.frames, seed=case.seed) < 0.6 if some_invalid else None
    with poisoned_memory():
        table = select_frames(query, means, top_k, valid=valid, query_block=query_block)
    alone = [select_frames(block, means, top_k, valid=valid) for block in query.split(query_block, dim=1)]
    assert torch.equal(table, torch.stack(alone, 2))


@BACKENDS
@KERNELS
@given(st.integers(0, 1000), st.integers(1, 8), st.booleans())
def test_ties_go_to_the_lower_index(seed, top_k, some_invalid):
    """Small integers: every score is exact in float32, equal scores are common."""
    query = draw(torch.randint, -1, 2, (2, 4, 3, 2), seed=seed).float()
    means = draw(torch.randint, -1, 2, (2, 7, 3, 2), seed=seed + 1).float()
    valid = draw(torch.rand, 2, 7, seed=seed + 2) < 0.5 if some_invalid else None
    expected = loops.best_frames(loops.scores(query, means), top_k, valid)
    assert select_frames(query, means, top_k, valid=valid).tolist() == expected


@BACKENDS
def test_all_scores_equal():
    assert select_frames(torch.zeros(1, 2, 1, 4), torch.ones(1, 5, 1, 4), 3).tolist() == [[[0, 1, 2]]]


@BACKENDS
def test_no_candidates():
    assert select_frames(torch.zeros(2, 3, 4, 5), torch.zeros(2, 0, 4, 5), 3).shape == (2, 4, 0)


@BACKENDS
def test_one_candidate():
    assert select_frames(torch.zeros(1, 3, 2, 5), torch.zeros(1, 1, 2, 5), 3).tolist() == [[[0], [0]]]


@BACKENDS
@pytest.mark.parametrize(("tokens", "heads", "head_dim", "frames"), [(24, 3, 20, 9), (7, 3, 24, 40), (300, 3, 128, 5)])
def test_larger_sizes_than_one_tile(tokens, heads, head_dim, frames):
    query = states(2, tokens, heads, head_dim, layout="fused")
    means = states(2, frames, heads, head_dim, layout="heads_first", seed=1)
    expected = loops.best_frames(loops.scores(query, means), 4)
    assert select_frames(query, means, 4).tolist() == expected


def test_the_choice_has_no_gradient():
    query = states(1, 3, 2, 4).requires_grad_()
    assert not select_frames(query, states(1, 5, 2, 4, seed=1).requires_grad_(), 2).requires_grad


@BACKENDS
def test_opcheck():
    valid = torch.tensor([[True, False, True, True]] * 2)
    for query_block in (None, 2):
        arguments = (states(2, 3, 2, 4), states(2, 4, 2, 4, seed=1), 3, valid, query_block)
        torch.library.opcheck(torch.ops.memflow.select_frames, arguments)


@BACKENDS
def test_compiles_to_one_graph():
    query, means = states(2, 3, 2, 4), states(2, 4, 2, 4, seed=1)
    compiled = torch.compile(lambda q, m: select_frames(q, m, 2) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(query, means), select_frames(query, means, 2) + 1)


QUERY, MEAN = torch.zeros(2, 3, 2, 4), torch.zeros(2, 5, 2, 4)


def test_bad_query_block():
    with pytest.raises(ValueError, match="query_block must be at least 1, got 0"):
        select_frames(QUERY, MEAN, 1, query_block=0)
    with pytest.raises(TypeError, match="query_block must be an int, got float"):
        select_frames(QUERY, MEAN, 1, query_block=2.0)


@pytest.mark.parametrize(
    ("arguments", "valid", "error", "message"),
    [
        ((QUERY, MEAN, 0), None, ValueError, "top_k must be at least 1, got 0"),
        ((QUERY, MEAN, -3), None, ValueError, "top_k must be at least 1, got -3"),
        ((QUERY, MEAN, 1.5), None, TypeError, "top_k must be an int, got float"),
        ((QUERY, MEAN, True), None, TypeError, "top_k must be an int, got bool"),
        ((QUERY, MEAN[:, :, :1], 1), None, ValueError, r"frame_mean must be \[B, F, H, D\] = \[2, 5, 2, 4\]"),
        ((QUERY.double(), MEAN, 1), None, TypeError, "frame_mean must be torch.float64"),
        ((QUERY[:, :0], MEAN, 1), None, ValueError, "query must be .* sizes of at least 1"),
        ((QUERY, MEAN, 1), torch.ones(2, 5), TypeError, "valid must be bool, got torch.float32"),
        ((QUERY, MEAN, 1), torch.ones(2, 4, dtype=torch.bool), ValueError, r"valid must be \[B, F\] = \[2, 5\]"),
        ((QUERY, MEAN.to("meta"), 1), None, ValueError, "frame_mean must be on the device of query"),
    ],
)
def test_bad_input(arguments, valid, error, message):
    with pytest.raises(error, match=message):
        select_frames(*arguments, valid=valid)

"""cover_frames against a plain greedy in float64, and what it does at the edges of its arguments."""

import loops
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memflow_kernels import cover_frames, prompt_relevance
from memflow_kernels.testing import draw, poisoned_memory, states

KERNELS = settings.get_profile("kernels")
BACKENDS = pytest.mark.usefixtures("backend")
HOLES = (torch.nan, torch.inf, -torch.inf)
SIZES = {
    "rows": st.integers(1, 3),
    "tokens": st.integers(0, 7),
    "frames": st.integers(0, 9),
    "seed": st.integers(0, 999),
}
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])


def inputs(rows, tokens, frames, seed, dtype=torch.float32, strided=False):
    """scores, weights with some of 0 and prior with some of -inf; strided: tokens innermost, priors far apart."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    shape = (rows, frames, tokens) if strided else (rows, tokens, frames)
    scores = draw(torch.randn, *shape, seed=seed).to(dtype)
    weights = draw(torch.rand, rows, tokens, seed=seed + 1).to(wide) - 0.2
    prior = 0.1 * draw(torch.randn, frames, rows, seed=seed + 2).to(wide)
    prior[draw(torch.rand, frames, rows, seed=seed + 3) < 0.15] = -torch.inf
    return (scores.mT, weights, prior.mT) if strided else (scores, weights, prior.mT.contiguous())


@BACKENDS
@KERNELS
@given(st.fixed_dictionaries(SIZES), st.integers(0, 11), DTYPES, st.booleans())
def test_every_choice_adds_most(sizes, k, dtype, strided):
    scores, weights, prior = inputs(**sizes, dtype=dtype, strided=strided)
    with poisoned_memory():
        table = cover_frames(scores, weights, k, prior)
    assert table.dtype == torch.int32
    assert table.shape == (sizes["rows"], min(k, sizes["frames"]))
    for row, places in enumerate(table.tolist()):
        for place, frame in enumerate(places):
            worth = loops.raised(scores[row], weights[row], prior[row], places[:place])
            if frame < 0:
                assert max(worth) == -torch.inf  # and so it stays: the places behind are -1 too
            else:  # two frames closer than float32 can tell may come in either order
                assert worth[frame] >= max(worth) - 1e-5


@BACKENDS
@KERNELS
@given(st.fixed_dictionaries(SIZES), st.integers(0, 11), DTYPES, st.booleans(), st.booleans())
def test_equal_to_the_plain_greedy_where_sums_are_exact(sizes, k, dtype, holes, strided):
    """Small integers: equal frames are common. With holes, scores and weights that are not numbers among them."""
    scores, weights, prior = inputs(**sizes, dtype=dtype, strided=strided)
    scores, weights, prior = (2 * scores).round(), (3 * weights).round(), (20 * prior).round()
    if holes:
        for number, hole in enumerate((torch.nan, -torch.inf)):
            scores[draw(torch.rand, *scores.shape, seed=number) < 0.15] = hole
        weights[draw(torch.rand, *weights.shape, seed=3) < 0.1] = torch.nan
        prior[draw(torch.rand, *prior.shape, seed=4) < 0.1] = torch.nan
    with poisoned_memory():
        table = cover_frames(scores, weights, k, prior)
    assert table.tolist() == loops.covering(scores, weights, k, prior)


@BACKENDS
@pytest.mark.parametrize(("tokens", "frames"), [(100, 24), (512, 200), (7, 300), (3, 5000)])
def test_sizes_of_a_story(tokens, frames):
    """More frames than a warp has lanes, more tokens than a tile; in quarters, whose sums are exact."""
    scores = (4 * draw(torch.randn, 1, tokens, frames, seed=0)).round() / 4
    weights, prior = torch.full((1, tokens), 0.25), (4 * draw(torch.randn, 1, frames, seed=1)).round() / 4
    prior[:, 1::3] -= 1000
    expected, best = [], None
    for _ in range(6):
        low = scores.amin(2) if best is None else best
        worth = (0.25 * (scores - low[..., None]).clamp(min=0)).double().sum(1) + prior
        worth[0, expected] = -torch.inf
        expected.append(int(worth.argmax()))
        best = low.maximum(scores[..., expected[-1]])
    assert cover_frames(scores, weights, 6, prior).tolist() == [expected]


@BACKENDS
@pytest.mark.parametrize("frames", [2, 9, 33])
@pytest.mark.parametrize("tokens", [1, 7, 100])
def test_identical_frames_tie(tokens, frames):
    """From the keys to the choice: the scores of equal frames are equal to the bit, and so is what they add."""
    for head_dim in (4, 24, 128):
        for seed in range(2):
            text, mean = states(2, tokens, 3, head_dim, seed=seed), states(2, 1, 3, head_dim, seed=seed + 9)
            other = states(2, 1, 3, head_dim, seed=seed + 5)
            means = torch.cat([other, mean.expand(2, frames, 3, head_dim)], 1)
            scores = prompt_relevance(text, frame_mean=means, aggregate="token")
            assert torch.equal(scores[..., 1:], scores[..., 1:2].expand(2, tokens, frames))
            prior = torch.tensor([-torch.inf] + [0.03] * frames).expand(2, -1)
            table = cover_frames(scores, torch.full((2, tokens), 1 / tokens), 3, prior)
            found = list(range(1, min(4, frames + 1))) + [-1] * (3 - min(frames, 3))
            assert table.tolist() == [found] * 2


@BACKENDS
def test_fewer_are_the_first_of_more():
    scores, weights, prior = inputs(3, 20, 12, seed=1)
    whole = cover_frames(scores, weights, 12, prior)
    for k in range(12):
        assert torch.equal(cover_frames(scores, weights, k, prior), whole[:, :k])


@BACKENDS
def test_a_word_of_its_own_gets_its_frame():
    """By sums alone frames 0 to 2 would be shown; the second token is then not covered."""
    scores = torch.tensor([[[5.0, 5.0, 5.0, 0.0], [0.0, 0.0, 0.0, 1.0]]])
    assert cover_frames(scores, torch.full((1, 2), 0.5), 2, torch.zeros(1, 4)).tolist() == [[0, 3]]


@BACKENDS
def test_numbers_that_are_not_numbers():
    even, none = torch.ones(1, 1), torch.zeros(1, 4)
    for hole in (torch.nan, -torch.inf):  # adds nothing, and is not where the token starts
        assert cover_frames(torch.tensor([[[hole, 1.0, 3.0, 2.0]]]), even, 3, none).tolist() == [[2, 0, 1]]
    infinite = torch.tensor([[[1.0, torch.inf, 3.0, torch.inf]]])
    assert cover_frames(infinite, even, 3, none).tolist() == [[1, 0, 2]]
    assert cover_frames(-infinite, even, 2, none).tolist() == [[0, 1]]
    for hole in HOLES:
        everywhere = torch.full((1, 3, 4), hole)
        assert cover_frames(everywhere, torch.ones(1, 3), 4, none).tolist() == [[0, 1, 2, 3]]
    plain = torch.tensor([[[0.0, 1.0, 3.0, 2.0]]])
    for weight in (torch.nan, 0.0, -1.0, -torch.inf):
        assert cover_frames(infinite, torch.full((1, 1), weight), 2, none).tolist() == [[0, 1]]
    assert cover_frames(plain, torch.full((1, 1), torch.inf), 2, none).tolist() == [[2, 0]]
    hidden = torch.tensor([[0.0, torch.nan, -torch.inf, torch.inf]])
    assert cover_frames(plain, even, 4, hidden).tolist() == [[3, 0, -1, -1]]


@BACKENDS
@pytest.mark.parametrize("hole", HOLES)
def test_what_does_not_count_is_not_read(hole):
    """Tokens of weight 0 and frames that may not be chosen hold anything."""
    scores, weights, prior = inputs(2, 9, 7, seed=3)
    expected = cover_frames(scores, weights, 4, prior)
    scores[weights <= 0] = hole
    assert torch.equal(cover_frames(scores, weights, 4, prior), expected)
    scores.masked_fill_(prior.isinf()[:, None], hole)
    assert torch.equal(cover_frames(scores, weights, 4, prior), expected)


@BACKENDS
def test_nothing_to_choose_by_or_from():
    prior = torch.tensor([[0.1, 0.3, 0.3, -torch.inf]])
    assert cover_frames(torch.zeros(1, 0, 4), torch.zeros(1, 0), 9, prior).tolist() == [[1, 2, 0, -1]]
    for rows, tokens, frames, k in ((1, 3, 0, 2), (2, 3, 4, 0), (0, 3, 4, 2), (1, 0, 0, 2)):
        table = cover_frames(torch.zeros(rows, tokens, frames), torch.ones(rows, tokens), k, torch.zeros(rows, frames))
        assert table.shape == (rows, min(k, frames))


@BACKENDS
def test_opcheck():
    for tokens, frames, k in ((3, 5, 2), (0, 5, 2), (3, 0, 2), (3, 2, 4)):
        torch.library.opcheck(
            torch.ops.memflow.cover_frames, (*inputs(2, tokens, frames, seed=0)[:2], k, torch.zeros(2, frames))
        )


@BACKENDS
def test_compiles_to_one_graph_for_every_size():
    compiled = torch.compile(lambda *x: cover_frames(*x) + 1, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows, tokens, frames, k in ((2, 5, 6, 3), (3, 9, 11, 4), (1, 4, 3, 5)):
        scores, weights, prior = inputs(rows, tokens, frames, seed=frames)
        assert torch.equal(compiled(scores, weights, k, prior), cover_frames(scores, weights, k, prior) + 1)


def test_transforms():
    scores, weights, prior = inputs(3, 5, 6, seed=2)
    stacked = torch.vmap(lambda *x: cover_frames(x[0], x[1], 2, x[2]))(
        *(x.unsqueeze(1) for x in (scores, weights, prior))
    )
    assert torch.equal(stacked[:, 0], cover_frames(scores, weights, 2, prior))
    leaf = scores.clone().requires_grad_()
    assert not cover_frames(leaf, weights, 2, prior.clone().requires_grad_()).requires_grad
    out = torch.ops.memflow.cover_frames(leaf, weights, 2, prior)
    assert not out.requires_grad


SCORES, WEIGHTS, PRIOR = torch.zeros(2, 3, 5), torch.zeros(2, 3), torch.zeros(2, 5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((SCORES[0], WEIGHTS, 1, PRIOR), ValueError, r"scores must be \[R, T, F\], 3 dimensions, got shape \[3, 5\]"),
        ((SCORES.int(), WEIGHTS, 1, PRIOR), TypeError, "scores must be float32 or .*, got torch.int32"),
        (([1.0], WEIGHTS, 1, PRIOR), TypeError, "scores must be a torch.Tensor, got list"),
        ((SCORES, WEIGHTS[:, :2], 1, PRIOR), ValueError, r"weights must be \[R, T\] = \[2, 3\], got \[2, 2\]"),
        ((SCORES, WEIGHTS.half(), 1, PRIOR), TypeError, "weights must be torch.float32 for scores in torch.float32"),
        ((SCORES, WEIGHTS, -1, PRIOR), ValueError, "k must be at least 0, got -1"),
        ((SCORES, WEIGHTS, 1.0, PRIOR), TypeError, "k must be an int, got float"),
        ((SCORES, WEIGHTS, 1, PRIOR[:1]), ValueError, r"prior must be \[R, F\] = \[2, 5\], got \[1, 5\]"),
        ((SCORES.double(), WEIGHTS.double(), 1, PRIOR), TypeError, "prior must be torch.float64"),
        ((SCORES, WEIGHTS, 1, PRIOR.to("meta")), ValueError, "prior must be on the device of scores, cpu, got meta"),
        ((SCORES, WEIGHTS, 1, None), TypeError, "prior must be a torch.Tensor, got NoneType"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        cover_frames(*arguments)

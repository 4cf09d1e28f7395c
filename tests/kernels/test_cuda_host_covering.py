"""cover_frames and prompt_relevance per token by the CUDA kernels, run on the CPU."""

import loops
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import cases
from test_covering import HOLES, SIZES, inputs

from memflow_kernels import reference
from memflow_kernels.testing import LAYOUTS, assert_close, draw, states

KERNELS = settings(settings.get_profile("kernels"), max_examples=15)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@KERNELS
@given(cases(head_dims=(1, 3, 8, 20, 64), dtypes=DTYPES), st.booleans(), st.sampled_from([0.2, -0.3, 0.0]))
def test_token_equals_the_loop(host, case, some, scale):
    text, means = case.query(), reference.frame_means(case.key(), case.tokens_per_frame)
    mask = draw(torch.rand, case.batch, case.queries, seed=case.seed) < 0.6 if some else None
    expected = torch.from_numpy(loops.relevance_token(text, means, scale, mask))
    if some:
        text[~mask] = torch.nan
    size = text.nan_to_num().double().abs().mean() * means.double().abs().mean() * abs(scale) * case.head_dim
    assert (host.prompt_relevance_token(text, means, mask, scale) - expected).abs().max() <= 1e-5 * size


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.bfloat16, 64), (torch.float16, 40), (torch.float32, 20)])
def test_more_than_one_tile_of_tokens_and_frames(host, layout, dtype, head_dim):
    text = states(2, 70, 2, head_dim, dtype=dtype, layout=layout)
    means = states(2, 37, 2, head_dim, layout=layout, seed=1)
    mask = draw(torch.rand, 2, 70, seed=0) < 0.7
    expected = reference.prompt_relevance_token(text.double(), means.double(), mask, 0.3)
    text[~mask], means[0, 5] = torch.nan, torch.nan
    score = host.prompt_relevance_token(text, means, mask, 0.3)
    assert not score[~mask].any()
    assert score[0, :, 5][mask[0]].isnan().all()
    score[0, :, 5] = expected[0, :, 5].float()
    assert_close(score, expected)


@KERNELS
@given(st.fixed_dictionaries(SIZES), st.integers(0, 11), st.sampled_from(DTYPES), st.booleans())
def test_covering_is_the_plain_greedy(host, sizes, k, dtype, holes):
    """Small integers: every sum is exact and equal frames are common."""
    scores, weights, prior = inputs(**sizes, dtype=dtype)
    scores, weights, prior = (2 * scores).round(), (3 * weights).round(), (20 * prior).round()
    if holes:
        for number, hole in enumerate(HOLES):
            scores[draw(torch.rand, *scores.shape, seed=number) < 0.1] = hole
        weights[draw(torch.rand, *weights.shape, seed=3) < 0.1] = torch.nan
        prior[draw(torch.rand, *prior.shape, seed=4) < 0.1] = torch.nan
    expected = reference.cover_frames(scores.double(), weights.double(), k, prior.double())
    if scores.isposinf().any():  # counts as the largest number, which is another one in float64
        expected = reference.cover_frames(scores.float(), weights, k, prior)
    assert torch.equal(host.cover_frames(scores, weights, k, prior), expected)


@pytest.mark.parametrize(("tokens", "frames", "multiprocessors"), [(100, 24, 1), (37, 70, 3), (512, 33, 2)])
def test_more_tokens_than_threads_and_more_frames_than_lanes(host, tokens, frames, multiprocessors):
    scores = (4 * draw(torch.randn, 2, tokens, frames, seed=0)).round() / 4
    weights, prior = torch.full((2, tokens), 0.25), (4 * draw(torch.randn, 2, frames, seed=1)).round() / 4
    expected = reference.cover_frames(scores, weights, 6, prior)
    for last_block_first in (False, True):
        with host.machine(multiprocessors, last_block_first):
            assert torch.equal(host.cover_frames(scores, weights, 6, prior), expected)


def test_sizes_that_are_not_served(host):
    with pytest.raises(NotImplementedError, match="cover_frames: unsupported"):
        host.cover_frames(torch.zeros(1, 5, 1365), torch.ones(1, 5), 1, torch.zeros(1, 1365))
    assert host.cover_frames(torch.zeros(1, 1, 1365), torch.ones(1, 1), 1, torch.zeros(1, 1365)).tolist() == [[0]]
    with pytest.raises(RuntimeError, match="cover_frames: error 1"):
        host.run("cover_frames", torch.zeros(6), 0, torch.zeros(2), torch.zeros(3), 1, 2, 3, -1, torch.zeros(3), None)

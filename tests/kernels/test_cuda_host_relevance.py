"""prompt_relevance by the CUDA kernels, run on the CPU."""

import loops
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import cases

from memflow_kernels import reference
from memflow_kernels.testing import LAYOUTS, assert_close, draw, states

KERNELS = settings(settings.get_profile("kernels"), max_examples=15)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = cases(head_dims=(1, 3, 8, 20, 64), dtypes=DTYPES)
SCALES = st.sampled_from([0.2, -0.3, 0.0])


def mask_of(case, some):
    return draw(torch.rand, case.batch, case.queries, seed=case.seed) < 0.6 if some else None


@KERNELS
@given(CASES, st.booleans(), SCALES)
def test_mean_equals_the_loop(host, case, some, scale):
    text, key, mask = case.query(), case.key(), mask_of(case, some)
    means = reference.frame_means(key, case.tokens_per_frame)
    expected = loops.relevance_mean(text, key, case.tokens_per_frame, scale, mask)
    size = text.double().abs().mean() * key.double().abs().mean() * abs(scale) * case.head_dim
    error = (host.prompt_relevance_mean(text, means, mask, scale) - torch.from_numpy(expected)).abs().max()
    assert error <= 1e-5 * size  # relative to what the products add up to without their signs


@KERNELS
@given(CASES, st.booleans(), SCALES)
def test_softmax_equals_the_loop(host, case, some, scale):
    text, key, mask = case.query(), case.key(), mask_of(case, some)
    expected = loops.relevance_softmax(text, key, case.tokens_per_frame, scale, mask)
    score = host.prompt_relevance_softmax(text, key, mask, case.tokens_per_frame, scale)
    assert_close(score, torch.from_numpy(expected))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.bfloat16, 64), (torch.float16, 128), (torch.float32, 64)])
def test_more_than_one_tile(host, layout, dtype, head_dim):
    """Text and keys that are no multiple of a tile, by tensor cores and without them, with padding of NaN."""
    text, key = (states(1, n, 2, head_dim, dtype=dtype, layout=layout, seed=n) for n in (131, 2 * 71))
    mask = draw(torch.rand, 1, 131, seed=0) < 0.7
    expected = reference.prompt_relevance_softmax(text.double(), key.double(), mask, 71, head_dim**-0.5)
    text[~mask] = torch.nan
    assert_close(host.prompt_relevance_softmax(text, key, mask, 71, head_dim**-0.5), expected)


def test_mean_of_a_long_prompt(host):
    text, means = states(2, 700, 3, 24, dtype=torch.bfloat16, mean=0.3), states(2, 5, 3, 24, mean=0.3, seed=1)
    mask = draw(torch.rand, 2, 700, seed=0) < 0.7
    mask[1] = False
    expected = reference.prompt_relevance_mean(text.double(), means.double(), mask, 0.5)
    text[~mask] = torch.nan
    score = host.prompt_relevance_mean(text, means, mask, 0.5)
    assert_close(score, expected)
    assert torch.equal(score[1], torch.zeros(5))

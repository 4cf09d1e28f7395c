import loops
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import cases

from memflow_kernels import frame_means, prompt_relevance
from memflow_kernels.ops.relevance import AGGREGATES
from memflow_kernels.testing import Traffic, assert_close, draw, poisoned_memory, relative_error, states

KERNELS = settings.get_profile("kernels")
BACKENDS = pytest.mark.usefixtures("backend")


def text_mask(case, share):
    return draw(torch.rand, case.batch, case.queries, seed=case.seed) < share


def largest_product(text, key, scale):
    """A sum of products near 0 has no relative accuracy: bilinear errors are measured by the size of the products."""
    return text.double().norm(dim=-1).mean() * key.double().norm(dim=-1).mean() * abs(scale)


@BACKENDS
@KERNELS
@given(cases(), st.sampled_from([None, 0.0, 0.6]), st.sampled_from([None, 0.3]))
def test_mean_equals_the_loop(case, share, scale):
    text, key = case.query(), case.key()
    mask = None if share is None else text_mask(case, share)
    with poisoned_memory():
        options = {"text_mask": mask, "scale": scale, "tokens_per_frame": case.tokens_per_frame}
        actual = prompt_relevance(text, key, **options)
        from_means = prompt_relevance(
            text, frame_mean=frame_means(key, case.tokens_per_frame), text_mask=mask, scale=scale
        )
    scale = case.head_dim**-0.5 if scale is None else scale
    expected = torch.from_numpy(loops.relevance_mean(text, key, case.tokens_per_frame, scale, mask))
    allowed = (1e-12 if case.dtype == torch.float64 else 1e-5) * largest_product(text, key, scale).cpu()
    assert actual.shape == expected.shape
    assert (actual.double().cpu() - expected).abs().max() <= allowed
    assert torch.equal(actual, from_means)


@BACKENDS
@KERNELS
@given(cases(), st.sampled_from([None, 0.0, 0.6]), st.sampled_from([None, 0.3]))
def test_token_equals_the_loop(case, share, scale):
    text, means = case.query(), frame_means(case.key(), case.tokens_per_frame)
    mask = None if share is None else text_mask(case, share)
    options = {"text_mask": mask, "scale": scale}
    with poisoned_memory():
        actual = prompt_relevance(text, frame_mean=means, aggregate="token", **options)
        by_key = {"tokens_per_frame": case.tokens_per_frame, "aggregate": "token", **options}
        assert torch.equal(actual, prompt_relevance(text, case.key(), **by_key))
    scale = case.head_dim**-0.5 if scale is None else scale
    expected = torch.from_numpy(loops.relevance_token(text, means, scale, mask))
    assert actual.shape == expected.shape
    assert actual.dtype == means.dtype
    allowed = (1e-12 if case.dtype == torch.float64 else 1e-5) * largest_product(text, means, scale).cpu()
    assert (actual.double().cpu() - expected).abs().max() <= allowed
    mean = prompt_relevance(text, frame_mean=means, **options)
    count = torch.full((case.batch,), case.queries) if mask is None else mask.sum(1).clamp(min=1)
    assert (actual.sum(1) / count[:, None] - mean).abs().max().cpu() <= allowed


@BACKENDS
@pytest.mark.parametrize(("tokens", "heads", "head_dim", "frames"), [(40, 3, 20, 37), (7, 12, 128, 24), (70, 1, 24, 7)])
def test_token_in_larger_sizes_than_one_tile(tokens, heads, head_dim, frames):
    text = states(2, tokens, heads, head_dim, dtype=torch.bfloat16, layout="fused")
    means = states(2, frames, heads, head_dim, layout="heads_first", seed=1)
    with poisoned_memory():
        score = prompt_relevance(text, frame_mean=means, aggregate="token")
    expected = torch.from_numpy(loops.relevance_token(text, means, head_dim**-0.5)).to(score.device)
    assert_close(score, expected)


@BACKENDS
@KERNELS
@given(cases(), st.sampled_from([None, 0.0, 0.6]), st.sampled_from([None, 0.3]))
def test_softmax_equals_the_loop(case, share, scale):
    text, key = case.query(), case.key()
    mask = None if share is None else text_mask(case, share)
    options = {"text_mask": mask, "scale": scale, "tokens_per_frame": case.tokens_per_frame}
    with poisoned_memory():
        actual = prompt_relevance(text, key, aggregate="softmax", **options)
    scale = case.head_dim**-0.5 if scale is None else scale
    expected = torch.from_numpy(loops.relevance_softmax(text, key, case.tokens_per_frame, scale, mask))
    assert relative_error(actual, expected) <= (1e-12 if case.dtype == torch.float64 else 1e-5)
    scored = torch.ones(case.batch) if mask is None else mask.any(1).float()
    torch.testing.assert_close(actual.sum(1).float(), scored)  # the shares of a row add up to 1


@BACKENDS
def test_softmax_survives_large_logits():
    text, key = states(1, 3, 2, 8, seed=1) * 100, states(1, 6, 2, 8, seed=2) * 100
    share = prompt_relevance(text, key, tokens_per_frame=2, aggregate="softmax")
    assert torch.isfinite(share).all()
    torch.testing.assert_close(share.sum(1), torch.ones(1))


def test_softmax_reads_strided_keys_in_place():
    """What it writes are logits and shares: nothing as large as the keys, however they lie in memory."""
    key = states(2, 4 * 50, 2, 64, layout="sliced")
    text = states(2, 3, 2, 64, seed=1)
    with Traffic() as traffic:
        prompt_relevance(text, key, tokens_per_frame=50, aggregate="softmax")
    assert traffic.written
    assert max(size for _, size in traffic.written) < key[:1, :50].nbytes


@BACKENDS
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_empty_bank(aggregate):
    text, key = states(2, 3, 2, 4), torch.zeros(2, 0, 2, 4)
    score = prompt_relevance(text, key, tokens_per_frame=5, aggregate=aggregate)
    assert score.shape == ((2, 3, 0) if aggregate == "token" else (2, 0))


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("masked", [False, True])
def test_gradient(aggregate, masked):
    text = states(2, 4, 2, 3, dtype=torch.float64, seed=1).requires_grad_()
    key = states(2, 6, 2, 3, dtype=torch.float64, seed=2).requires_grad_()
    mask = torch.tensor([[True, False, True, True], [False] * 4]) if masked else None

    def score(text, key):
        return prompt_relevance(text, key, tokens_per_frame=2, text_mask=mask, aggregate=aggregate)

    assert torch.autograd.gradcheck(score, (text, key))


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tokens", "heads", "head_dim"), [(24, 3, 20), (7, 1, 128)])
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_gradient_equals_that_in_float64(aggregate, tokens, heads, head_dim, dtype):
    """Through the kernels, against the specification; 40 text tokens are more than one tile."""
    text = states(2, 40, heads, head_dim, dtype=dtype, layout="fused", seed=1)
    key = states(2, 3 * tokens, heads, head_dim, dtype=dtype, layout="heads_first", seed=2)
    mask = draw(torch.rand, 2, 40, seed=3) < 0.7
    wanted = draw(torch.randn, *((2, 40, 3) if aggregate == "token" else (2, 3)), seed=4)
    grads = []
    for inputs in ((text, key), (text.double(), key.double())):
        leaves = [x.detach().requires_grad_() for x in inputs]
        options = {"tokens_per_frame": tokens, "text_mask": mask, "aggregate": aggregate}
        with poisoned_memory():
            score = prompt_relevance(*leaves, **options)
            grads.append(torch.autograd.grad((score * wanted).sum(), leaves))
    for actual, expected in zip(*grads, strict=True):
        assert_close(actual, expected, roundings=2)


def test_gradient_of_frame_means():
    text = states(2, 4, 2, 3, dtype=torch.float64, seed=1).requires_grad_()
    mean = states(2, 5, 2, 3, dtype=torch.float64, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda text, mean: prompt_relevance(text, frame_mean=mean), (text, mean))


@BACKENDS
def test_opcheck():
    text, key = states(2, 3, 2, 4, seed=1).requires_grad_(), states(2, 6, 2, 4, seed=2).requires_grad_()
    mask = torch.tensor([[True, False, True]] * 2)
    torch.library.opcheck(torch.ops.memflow.prompt_relevance_mean, (text, key, mask, 0.5))
    torch.library.opcheck(torch.ops.memflow.prompt_relevance_token, (text, key, mask, 0.5))
    torch.library.opcheck(torch.ops.memflow.prompt_relevance_softmax, (text, key, None, 3, 0.5))
    grad = torch.ones(2, 2)
    torch.library.opcheck(
        torch.ops.memflow.prompt_relevance_softmax_backward, (grad, text.detach(), key.detach(), mask, 3, 0.5)
    )


@BACKENDS
def test_compiles_to_one_graph():
    text, key = states(2, 3, 2, 4, seed=1).requires_grad_(), states(2, 6, 2, 4, seed=2).requires_grad_()

    def score(text, key):
        mean, shares, by_token = (prompt_relevance(text, key, aggregate=x, tokens_per_frame=3) for x in AGGREGATES)
        return mean * shares * by_token.amax(1)

    eager = score(text, key)
    compiled = torch.compile(score, fullgraph=True, backend="aot_eager")(text, key)
    assert torch.equal(compiled, eager)
    expected = torch.autograd.grad(eager.sum(), (text, key))
    actual = torch.autograd.grad(compiled.sum(), (text, key))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


TEXT, KEY = torch.zeros(2, 3, 2, 4), torch.zeros(2, 6, 2, 4)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((TEXT, KEY), {"aggregate": "max"}, ValueError, "aggregate must be one of mean, softmax, token, got 'max'"),
        ((TEXT,), {"aggregate": "token"}, ValueError, 'is needed for aggregate="token", got neither'),
        ((TEXT,), {}, ValueError, "frame_mean, or key and tokens_per_frame, is needed"),
        ((TEXT, KEY), {}, ValueError, "tokens_per_frame is needed together with key, got None"),
        ((TEXT,), {"aggregate": "softmax", "frame_mean": KEY}, ValueError, "key is needed for"),
        ((TEXT, KEY[:1]), {"tokens_per_frame": 2}, ValueError, r"key must be .* = \[2, 6, 2, 4\], got \[1, 6, 2, 4\]"),
        (
            (TEXT, KEY.double()),
            {"tokens_per_frame": 2},
            TypeError,
            "key must have the dtype of text_key, torch.float32",
        ),
        ((TEXT, KEY), {"tokens_per_frame": 4}, ValueError, "not a multiple of tokens_per_frame = 4"),
        ((TEXT,), {"frame_mean": KEY.bfloat16()}, TypeError, "frame_mean must be torch.float32"),
        ((TEXT,), {"frame_mean": KEY[..., :2]}, ValueError, r"frame_mean must be .* got \[2, 6, 2, 2\]"),
        ((TEXT,), {"frame_mean": KEY, "text_mask": torch.ones(2, 3)}, TypeError, "text_mask must be bool"),
        (
            (TEXT,),
            {"frame_mean": KEY, "text_mask": torch.ones(2, 4, dtype=torch.bool)},
            ValueError,
            r"text_mask must be \[B, T\] = \[2, 3\], got \[2, 4\]",
        ),
        ((TEXT,), {"frame_mean": KEY, "scale": float("nan")}, ValueError, "scale must be finite, got nan"),
        ((TEXT,), {"frame_mean": KEY, "scale": "1"}, TypeError, "scale must be a number, got str"),
        ((TEXT[:, :0],), {"frame_mean": KEY}, ValueError, "text_key must be .* sizes of at least 1"),
        ((TEXT,), {"frame_mean": KEY.to("meta")}, ValueError, "frame_mean must be on the device of text_key, cpu"),
    ],
)
def test_bad_input(arguments, options, error, message):
    with pytest.raises(error, match=message):
        prompt_relevance(*arguments, **options)

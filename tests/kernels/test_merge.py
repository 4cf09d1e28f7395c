import loops
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import cases

from memflow_kernels import merge_attention
from memflow_kernels.testing import assert_close, poisoned_memory, relative_error, states

KERNELS = settings.get_profile("kernels")
BACKENDS = pytest.mark.usefixtures("backend")


def parts(case, split):
    """Attention over the first `split` tokens and over the rest, and over all, from the loop; rounded to the dtype."""
    query, key, value = case.query(), case.key(), case.value()
    scale = case.head_dim**-0.5
    pieces = []
    for tokens in (slice(0, split), slice(split, None), slice(None)):
        out, lse = loops.attention(query, key[:, tokens], value[:, tokens], 1, scale)
        wide = torch.float64 if case.dtype == torch.float64 else torch.float32
        pieces += [torch.from_numpy(out).to(query.device, case.dtype), torch.from_numpy(lse).to(query.device, wide)]
    return pieces


@BACKENDS
@KERNELS
@given(cases(), st.floats(0, 1))
def test_equals_attention_over_the_union(case, share):
    """Also where one side has no key: share 0 and 1."""
    split = round(share * case.frames * case.tokens_per_frame)
    out_a, lse_a, out_b, lse_b, expected, expected_lse = parts(case, split)
    with poisoned_memory():
        out, lse = merge_attention(out_a, lse_a, out_b, lse_b)
    assert out.dtype == case.dtype
    assert_close(out, expected, roundings=3)
    assert_close(lse, expected_lse)


@BACKENDS
def test_no_key_on_either_side():
    out, lse = torch.zeros(1, 3, 2, 4), torch.full((1, 2, 3), -torch.inf)
    merged, merged_lse = merge_attention(out, lse, out, lse)
    assert torch.equal(merged, out)
    assert torch.equal(merged_lse, lse)


@BACKENDS
def test_a_key_in_both_sets_counts_twice():
    out, lse = states(1, 3, 2, 4), torch.zeros(1, 2, 3)
    merged, merged_lse = merge_attention(out, lse, out, lse)
    torch.testing.assert_close(merged, out)
    torch.testing.assert_close(merged_lse, torch.full((1, 2, 3), 2.0).log())


@BACKENDS
@pytest.mark.parametrize("mark", [-torch.inf, torch.inf], ids=str)
@pytest.mark.parametrize("held", [0.0, torch.nan, torch.inf], ids=str)
def test_a_side_without_keys_does_not_count(mark, held):
    """Marked by -inf, or by +inf as flash-attn 2 and vLLM do it, whatever its result holds; also on both sides."""
    out, lse = states(1, 3, 2, 4), states(1, 2, 3, 1, seed=1)[..., 0].contiguous()
    nothing, no_mass = torch.full_like(out, held), torch.full_like(lse, mark)
    for sides in ((out, lse, nothing, no_mass), (nothing, no_mass, out, lse)):
        leaves = [x.detach().clone().requires_grad_() for x in sides]
        merged, merged_lse = merge_attention(*leaves)
        assert torch.equal(merged, out)
        torch.testing.assert_close(merged_lse, lse, rtol=0, atol=1e-6)
        grads = torch.autograd.grad(merged.sum() + merged_lse.sum(), leaves)
        for side, grad in zip(sides, grads, strict=True):
            full = side is out or side is lse
            assert torch.equal(grad, torch.full_like(side, float(full)))
    merged, merged_lse = merge_attention(nothing, no_mass, nothing, -no_mass)
    assert not merged.any()
    assert torch.equal(merged_lse, torch.full_like(lse, -torch.inf))


@BACKENDS
def test_nan_is_not_hidden():
    out, lse = torch.ones(1, 1, 2, 4), torch.zeros(1, 2, 1)
    broken = lse.clone()
    broken[0, 1] = torch.nan
    merged, merged_lse = merge_attention(out, lse, out, broken)
    assert merged.isnan().all(-1).tolist() == [[[False, True]]]
    assert merged_lse.isnan().tolist() == [[[False], [True]]]


@BACKENDS
@pytest.mark.parametrize("offset", [0, 100, 1000, 5000, -5000])
def test_the_error_does_not_grow_with_the_log_sum_exp(offset):
    """exp(lse_a - lse) would be off by the rounding of lse; shares divided by their sum are not."""
    (out_a, out_b), (lse_a, lse_b) = ([states(1, 32, 4, d, seed=s + d) for s in (0, 1)] for d in (32, 1))
    lse_a, lse_b = ((x[..., 0].transpose(1, 2) + offset).contiguous() for x in (lse_a, lse_b))
    out, lse = merge_attention(out_a, lse_a, out_b, lse_b)
    exact, exact_lse = merge_attention(*(x.double() for x in (out_a, lse_a, out_b, lse_b)))
    assert relative_error(out, exact) < 2e-7
    assert relative_error(lse, exact_lse) < 2e-7
    upstream = states(1, 32, 4, 32, seed=7)
    grads = []
    for sides in ((out_a, lse_a, out_b, lse_b), tuple(x.double() for x in (out_a, lse_a, out_b, lse_b))):
        leaves = [x.detach().requires_grad_() for x in sides]
        grads.append(torch.autograd.grad(merge_attention(*leaves)[0], leaves, upstream.to(sides[0].dtype)))
    for ours, right in zip(*grads, strict=True):
        assert relative_error(ours, right) < 1e-6


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_merging_a_result_with_itself_changes_nothing_but_its_mass(dtype):
    out, lse = states(2, 11, 3, 64, dtype=dtype), 30 * states(2, 3, 11, 1, seed=1)[..., 0].contiguous()
    merged, merged_lse = merge_attention(out, lse, out, lse)
    assert torch.equal(merged, out)
    torch.testing.assert_close(merged_lse, lse + torch.tensor(2.0).log(), rtol=0, atol=1e-5)


def inputs(dtype):
    out_a, out_b = states(2, 3, 2, 4, dtype=dtype), states(2, 3, 2, 4, dtype=dtype, seed=1)
    lse_a, lse_b = states(2, 2, 3, 1, dtype=dtype, seed=2)[..., 0], states(2, 2, 3, 1, dtype=dtype, seed=3)[..., 0]
    return [x.contiguous().requires_grad_() for x in (out_a, lse_a, out_b, lse_b)]


def test_gradient():
    assert torch.autograd.gradcheck(merge_attention, inputs(torch.float64))


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_in_low_precision(dtype):
    arguments = inputs(dtype)
    arguments[1], arguments[3] = (x.detach().float().requires_grad_() for x in (arguments[1], arguments[3]))
    upstream = states(2, 3, 2, 4, dtype=dtype, seed=5), states(2, 2, 3, 1, seed=6)[..., 0]
    wide = [x.detach().double().requires_grad_() for x in arguments]
    expected = torch.autograd.grad(merge_attention(*wide), wide, [x.double() for x in upstream])
    actual = torch.autograd.grad(merge_attention(*arguments), arguments, upstream)
    for ours, exact in zip(actual, expected, strict=True):
        assert_close(ours, exact, roundings=2)


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradient_is_finite_where_a_side_is_empty(dtype):
    out_a, lse_a, out_b, _ = inputs(dtype)
    empty = torch.full((2, 2, 3), -torch.inf, dtype=dtype, requires_grad=True)
    out, lse = merge_attention(out_a, lse_a, out_b, empty)
    grads = torch.autograd.grad(out.sum() + lse.sum(), (out_a, lse_a, out_b, empty))
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert torch.equal(grads[0], torch.ones_like(out_a))
    assert torch.equal(grads[2], torch.zeros_like(out_b))


@BACKENDS
def test_opcheck():
    torch.library.opcheck(torch.ops.memflow.merge_attention, inputs(torch.float32))


@BACKENDS
def test_compiles_to_one_graph():
    arguments = inputs(torch.float32)
    compiled = torch.compile(merge_attention, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(*arguments), merge_attention(*arguments), strict=True):
        assert torch.equal(actual, expected)


OUT, LSE = torch.zeros(2, 3, 2, 4), torch.zeros(2, 2, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((OUT, LSE, OUT[:1], LSE), ValueError, r"out_b must be .* like out_a = \[2, 3, 2, 4\], got \[1, 3, 2, 4\]"),
        ((OUT, LSE, OUT.bfloat16(), LSE), TypeError, "out_b must have the dtype of out_a"),
        ((OUT, LSE.mT, OUT, LSE), ValueError, r"lse_a must be \[B, H, Lq\] = \[2, 2, 3\], got \[2, 3, 2\]"),
        ((OUT, LSE, OUT, LSE.bfloat16()), TypeError, "lse_b must be torch.float32"),
        ((OUT, LSE, OUT, None), TypeError, "lse_b must be a torch.Tensor, got NoneType"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        merge_attention(*arguments)

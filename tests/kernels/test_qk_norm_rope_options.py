"""qk_norm_rope with the rotation and the norm of other models than Wan: axes, theta, norm_scope; and with no norm."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import cases

from memflow_kernels import Pool, frame_means, qk_norm_rope, qk_norm_rope_write
from memflow_kernels.reference.rotary import rms_norm_heads
from memflow_kernels.testing import assert_close, poisoned_memory, states

BACKENDS = pytest.mark.usefixtures("backend")
FEW = settings(settings.get_profile("kernels"), max_examples=10)
WAN = {"weight_q": torch.ones(48), "weight_k": torch.ones(48), "eps": 1e-6, "grid": (2, 3), "start_frame": 5}


def expected(x, weight, grid, start_frame, axes, theta, per_head):
    """Token by token and pair by pair, in float64."""
    x, weight = x.double().cpu(), weight.double().cpu()
    dims = (-1,) if per_head else (-2, -1)
    normed = x / (x.square().mean(dims, keepdim=True) + 1e-6).sqrt()
    normed = normed * (weight if per_head else weight.view(x.shape[-2:]))
    out = normed.clone()
    rows, cols = grid
    for token in range(x.shape[1]):
        position = (start_frame + token // (rows * cols), token // cols % rows, token % cols)
        first = 0
        for axis, channels in enumerate(axes):
            for pair in range(channels // 2):
                angle = position[axis] * theta ** (-2 * pair / channels)
                even, odd = (normed[:, token, :, first + 2 * pair + i] for i in (0, 1))
                out[:, token, :, first + 2 * pair] = even * math.cos(angle) - odd * math.sin(angle)
                out[:, token, :, first + 2 * pair + 1] = even * math.sin(angle) + odd * math.cos(angle)
            first += channels
    return out


@BACKENDS
@FEW
@given(cases(head_dims=(2, 4, 8, 20, 24)), st.data())
def test_equals_the_loop(case, data):
    along_row = 2 * data.draw(st.integers(0, case.head_dim // 2))
    along_frame = 2 * data.draw(st.integers(0, (case.head_dim - along_row) // 2))
    axes = (along_frame, along_row, case.head_dim - along_row - along_frame)
    theta = data.draw(st.sampled_from([256.0, 10000.0, 1e6]))
    scope = data.draw(st.sampled_from(["heads", "head"]))
    start = data.draw(st.sampled_from([0, 7, 1000]))
    rows = 2 if case.tokens_per_frame % 2 == 0 else 1
    grid = (rows, case.tokens_per_frame // rows)
    tokens = case.frames * case.tokens_per_frame
    query, key, value = (case.states(tokens, salt) for salt in (1, 3, 4))
    size = case.head_dim * (1 if scope == "head" else case.heads)
    weight_q, weight_k = (states(1, 1, 1, size, seed=s, mean=1.0).flatten().to(case.dtype) for s in (5, 6))
    options = {"weight_q": weight_q, "weight_k": weight_k, "eps": 1e-6, "grid": grid, "start_frame": start}
    options |= {"axes": axes, "theta": theta, "norm_scope": scope}
    pool = Pool.zeros(case.batch, case.frames, case.tokens_per_frame, case.heads, case.head_dim, dtype=case.dtype,
                      device=query.device)  # fmt: skip
    slots = torch.arange(case.frames - 1, -1, -1, dtype=torch.int32)
    with poisoned_memory():
        new_query, new_key = qk_norm_rope(query, key, **options)
        written, mean = qk_norm_rope_write(query, key, value, **options, pool=pool, slots=slots, query_mean=True)
    for actual, x, weight in ((new_query, query, weight_q), (new_key, key, weight_k)):
        assert actual.dtype == case.dtype
        assert_close(actual, expected(x, weight, grid, start, axes, theta, scope == "head"), roundings=3)
    assert_close(written, new_query)
    assert_close(mean, frame_means(new_query, tokens)[:, 0])
    backwards = new_key.unflatten(1, (case.frames, -1)).flip(1).flatten(1, 2)
    assert_close(pool.key, backwards)


@pytest.mark.parametrize("scope", ["heads", "head"])
def test_gradient(scope):
    query, key = (states(2, 6, 2, 6, dtype=torch.float64, seed=s).requires_grad_() for s in (0, 1))
    size = 6 if scope == "head" else 12
    weights = [states(1, 1, 1, size, dtype=torch.float64, seed=s).flatten().requires_grad_() for s in (2, 3)]

    def normed(query, key, weight_q, weight_k):
        options = {"axes": (2, 0, 4), "theta": 50.0, "norm_scope": scope}
        return qk_norm_rope(
            query, key, weight_q=weight_q, weight_k=weight_k, eps=1e-6, grid=(1, 3), start_frame=2, **options
        )

    assert torch.autograd.gradcheck(normed, (query, key, *weights))


@BACKENDS
def test_opcheck_and_compile():
    query, key = (states(1, 12, 2, 24, seed=s).requires_grad_() for s in (0, 1))
    weight = torch.ones(24, requires_grad=True)
    place = (1e-6, 2, 3, 5, None, [16, 4, 4], 256.0, True)
    torch.library.opcheck(torch.ops.memflow.qk_norm_rope, (query, key, weight, weight, *place))

    def normed(query, key):
        options = {"axes": (16, 4, 4), "theta": 256.0, "norm_scope": "head", "weight_q": weight, "weight_k": weight}
        return qk_norm_rope(query, key, **{**WAN, **options})[1]

    compiled = torch.compile(normed, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(query, key), normed(query, key))
    grads = [torch.autograd.grad(run(query, key).square().sum(), key)[0] for run in (compiled, normed)]
    assert_close(*grads)


@BACKENDS
def test_wans_own_values_are_the_default():
    """Given as numbers they run by the same kernel: an operator leaves defaults out of the call."""
    query, key = (states(1, 12, 2, 24, seed=s) for s in (0, 1))
    given = qk_norm_rope(query, key, **WAN, axes=(8, 8, 8), theta=10000, norm_scope="heads")
    assert all(torch.equal(a, b) for a, b in zip(given, qk_norm_rope(query, key, **WAN), strict=True))


@BACKENDS
@FEW
@given(cases(head_dims=(2, 8, 20, 24)), st.sampled_from([0, 57, 100_000]))
def test_heads_that_are_normed_already(case, start):
    """Some heads of a layer, normed with all of them elsewhere, are written as by a call over all heads."""
    tokens, heads = case.frames * case.tokens_per_frame, 3 * case.heads
    query, key, value = (
        states(case.batch, tokens, heads, case.head_dim, dtype=case.dtype, seed=case.seed + s) for s in (1, 2, 3)
    )
    weights = [states(1, 1, 1, heads * case.head_dim, seed=s, mean=1.0).flatten().to(case.dtype) for s in (5, 6)]
    place = {"grid": (1, case.tokens_per_frame), "start_frame": start, "query_mean": True}
    slots = torch.tensor([*range(case.frames - 1, 0, -1), -1], dtype=torch.int32)
    normed = [rms_norm_heads(x, weight, 1e-6) for x, weight in zip((query, key), weights, strict=True)]
    pools = []
    for count in (heads, case.heads):
        sizes = (case.batch, case.frames, case.tokens_per_frame, count, case.head_dim)
        pools.append(Pool.zeros(*sizes, dtype=case.dtype, device=query.device))
    mine = slice(case.heads, 2 * case.heads)
    with poisoned_memory():
        whole = qk_norm_rope_write(
            query, key, value, weight_q=weights[0], weight_k=weights[1], eps=1e-6, pool=pools[0], slots=slots, **place
        )
        some = qk_norm_rope_write(*(x[:, :, mine] for x in (*normed, value)), pool=pools[1], slots=slots, **place)
    for actual, expected in zip((*some, *pools[1]), (*whole, *pools[0]), strict=True):
        assert_close(actual, expected[..., mine, :].double(), dtype=actual.dtype, roundings=2)
    assert torch.equal(pools[1].value, pools[0].value[:, :, mine])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_q": torch.ones(48)}, "weight_q, weight_k and eps go together: .*; got weight_q$"),
        ({"weight_q": torch.ones(48), "weight_k": torch.ones(48)}, "got weight_q, weight_k$"),
        ({"eps": 1e-6}, "got eps$"),
        ({"norm_scope": "head"}, "norm_scope='head' says how to norm"),
    ],
)
def test_half_a_norm(options, message):
    x, pool = states(1, 12, 2, 24), Pool.zeros(1, 2, 6, 2, 24)
    slots = torch.tensor([0, 1], dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        qk_norm_rope_write(x, x, x, **options, grid=(2, 3), start_frame=0, pool=pool, slots=slots)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"axes": (8, 8, 6)},
            ValueError,
            r"axes must be even numbers that add up to the head size D = 24, got \(8, 8, 6\)",
        ),
        ({"axes": (9, 7, 8)}, ValueError, "axes must be even numbers"),
        ({"axes": (12, 12)}, TypeError, r"axes must be channels per \(frame, row, column\), got \(12, 12\)"),
        ({"axes": (8.0, 8, 8)}, TypeError, "axes must be an int, got float"),
        ({"theta": -1}, ValueError, "theta must be above 0 and finite, got -1"),
        ({"theta": "1"}, TypeError, "theta must be a number, got str"),
        ({"norm_scope": "token"}, ValueError, r"norm_scope must be 'heads' \(all together\) or 'head'"),
        ({"norm_scope": "head"}, ValueError, r"weight_q must be \[D\] = \[24\], got \[48\]"),
    ],
)
def test_bad_options(options, error, message):
    query = states(1, 12, 2, 24)
    with pytest.raises(error, match=message):
        qk_norm_rope(query, query, **{**WAN, **options})

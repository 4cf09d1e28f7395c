"""rotate_keys and rotate_keys_write against float64, against qk_norm_rope, and in every way they are called."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import cases

from memflow_kernels import Pool, qk_norm_rope, rotate_keys, rotate_keys_write
from memflow_kernels.testing import LAYOUTS, assert_close, poisoned_memory, states

KERNELS = settings.get_profile("kernels")
BACKENDS = pytest.mark.usefixtures("backend")
FEW = settings(KERNELS, max_examples=10)
PLACES = st.sampled_from([0, 1, -3, 57, 1023, 100_000, 16_777_217, -2_000_000_000])


def turned(key, places, tokens_per_frame, channels, theta):
    """The loop, in float64: places [B][F]."""
    out = key.double().cpu().clone()
    for batch, row in enumerate(places):
        for frame, place in enumerate(row):
            tokens = slice(frame * tokens_per_frame, (frame + 1) * tokens_per_frame)
            for pair in range(channels // 2):
                angle = math.fmod(place * theta ** (-2 * pair / channels), 2 * math.pi)
                even, odd = (out[batch, tokens, :, 2 * pair + i].clone() for i in (0, 1))
                out[batch, tokens, :, 2 * pair] = even * math.cos(angle) - odd * math.sin(angle)
                out[batch, tokens, :, 2 * pair + 1] = even * math.sin(angle) + odd * math.cos(angle)
    return out


@BACKENDS
@FEW
@given(cases(head_dims=(2, 4, 8, 20, 24)), st.data())
def test_equals_the_loop(case, data):
    channels = 2 * data.draw(st.integers(1, case.head_dim // 2))
    theta = data.draw(st.sampled_from([10000.0, 256.0, 1e6]))
    rows = [[data.draw(PLACES) for _ in range(case.frames)] for _ in range(case.batch)]
    shared = data.draw(st.booleans())
    places = torch.tensor(rows[0] if shared else rows)
    key = case.key()
    with poisoned_memory():
        new = rotate_keys(key, places, tokens_per_frame=case.tokens_per_frame, channels=channels, theta=theta)
    assert new.dtype == key.dtype and new.is_contiguous()
    expected = turned(key, rows[:1] * case.batch if shared else rows, case.tokens_per_frame, channels, theta)
    # a place of 2e9 times a rounded speed: float64's own angle is off by 2e-7
    assert_close(new, expected, torch.float32 if key.dtype == torch.float64 else None)
    assert torch.equal(new[..., channels:], key[..., channels:])


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_write_turns_the_first_slots_and_nothing_else(layout, dtype):
    slots, tokens, heads, head_dim, channels = 5, 7, 3, 20, 8
    key = states(2, slots * tokens, heads, channels, layout=layout, dtype=dtype)
    mean = states(2, slots, heads, head_dim, seed=1)
    pool = Pool(
        *(states(2, slots * tokens, heads, head_dim, layout=layout, dtype=dtype, seed=s) for s in (2, 3)), mean + 1
    )
    before = [part.clone() for part in pool]
    places = torch.tensor([4, 0, 1560], dtype=torch.int32)
    rotate_keys_write(key, mean, places, pool=pool)
    expected = rotate_keys(key[:, : 3 * tokens], places, tokens_per_frame=tokens, channels=channels)
    assert torch.equal(pool.key[:, : 3 * tokens, :, :channels], expected)
    assert torch.equal(pool.key[..., channels:], before[0][..., channels:])
    assert torch.equal(pool.key[:, 3 * tokens :], before[0][:, 3 * tokens :])
    assert torch.equal(pool.value, before[1])
    assert torch.equal(pool.frame_mean[:, :3], rotate_keys(mean[:, :3], places, tokens_per_frame=1, channels=channels))
    assert torch.equal(pool.frame_mean[:, 3:], before[2][:, 3:])


@BACKENDS
def test_a_key_of_frame_0_moves_to_any_frame():
    """Where qk_norm_rope would have put it, but for one rounding."""
    key, weight = states(1, 12, 2, 24), torch.ones(48)
    options = {"weight_q": weight, "weight_k": weight, "eps": 1e-6, "grid": (2, 3)}
    _, there = qk_norm_rope(key, key, **options, start_frame=41)
    _, at_zero = qk_norm_rope(key.unflatten(1, (2, 6)).flatten(0, 1), key.unflatten(1, (2, 6)).flatten(0, 1),
                              **options, start_frame=0)  # fmt: skip
    moved = rotate_keys(at_zero.view(1, 12, 2, 24), torch.tensor([41, 42]), tokens_per_frame=6)
    assert_close(moved, there)


def test_gradient():
    key = states(2, 6, 2, 12, dtype=torch.float64).requires_grad_()
    places = torch.tensor([[3, -2], [0, 100]])
    move = lambda x: rotate_keys(x, places, tokens_per_frame=3)  # noqa: E731
    assert torch.autograd.gradcheck(move, key)
    assert torch.autograd.gradgradcheck(move, key)
    (grad,) = torch.autograd.grad(move(key).sum(), key)  # its gradient is expanded from one number
    torch.testing.assert_close(grad, rotate_keys(torch.ones_like(key), -places, tokens_per_frame=3))


@BACKENDS
def test_opcheck():
    key, places = states(2, 6, 2, 12).requires_grad_(), torch.tensor([1, 5])
    torch.library.opcheck(torch.ops.memflow.rotate_keys, (key, places, 3, 4, 10000.0))
    pool = Pool.zeros(2, 3, 3, 2, 16)
    arguments = (states(2, 9, 2, 12), states(2, 3, 2, 16), places, 10000.0, pool.key, pool.frame_mean)
    torch.library.opcheck(torch.ops.memflow.rotate_keys_write, arguments)


@BACKENDS
def test_compiles_to_one_graph_for_all_places():
    key, mean = states(1, 9, 2, 8), states(1, 3, 2, 12)

    def place(places, pool):
        rotate_keys_write(key, mean, places, pool=pool)
        return rotate_keys(pool.key, -places, tokens_per_frame=3)

    compiled = torch.compile(place, fullgraph=True, backend="aot_eager")
    for places in (torch.tensor([0, 1, 2]), torch.tensor([7, 5, 1])):
        pools = [Pool.zeros(1, 3, 3, 2, 12) for _ in range(2)]
        assert torch.equal(compiled(places, pools[0]), place(places, pools[1]))
        assert all(torch.equal(a, b) for a, b in zip(*pools, strict=True))
        with torch._dynamo.config.patch(error_on_recompile=True):
            compiled(places + 1, pools[0])


KEY, POOL = states(1, 6, 2, 8), Pool.zeros(1, 2, 3, 2, 12)
MEAN = torch.zeros(1, 2, 2, 12)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"places": torch.zeros(2)}, TypeError, "places must be int32 or int64, got torch.float32"),
        ({"places": torch.tensor([1])}, ValueError, r"places must be \[F\] or \[B, F\] = \[2\], got \[1\]"),
        ({"places": torch.tensor([[1]])}, ValueError, r"places must be \[B, F\] = \[1, 2\], got \[1, 1\]"),
        ({"channels": 3}, ValueError, "channels must be even, as they turn in pairs, and at most 8, got 3"),
        ({"channels": 10}, ValueError, "at most 8, got 10"),
        ({"theta": 0}, ValueError, "theta must be above 0 and finite, got 0"),
        ({"tokens_per_frame": 4}, ValueError, "key has 6 tokens, not a multiple of tokens_per_frame = 4"),
        ({"key": KEY.int()}, TypeError, "key must be float32"),
    ],
)
def test_bad_input(options, error, message):
    with pytest.raises(error, match=message):
        rotate_keys(**{"key": KEY, "places": torch.tensor([1, 2]), "tokens_per_frame": 3, **options})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"pool": (KEY, KEY, MEAN)}, TypeError, "pool must be a memflow_kernels.Pool, got tuple"),
        ({"places": torch.tensor([1, 2, 3])}, ValueError, r"at most the 2 slots, got shape \[3\]"),
        ({"places": torch.tensor([[1]])}, ValueError, r"places must be \[F\]"),
        ({"key": KEY.double()}, TypeError, "pool.key must have the dtype of key"),
        (
            {"key": states(1, 6, 2, 14)},
            ValueError,
            "channels must be even, as they turn in pairs, and at most 12, got 14",
        ),
        (
            {"key": states(1, 3, 2, 8)},
            ValueError,
            r"key must be \[B, S\*N, H, C\] = \[1, 6, 2, 8\], got \[1, 3, 2, 8\]",
        ),
        ({"frame_mean": MEAN.half()}, TypeError, "frame_mean must be torch.float32 for key in torch.float32"),
        ({"key": KEY.clone().requires_grad_()}, RuntimeError, "rotate_keys_write writes into the pool"),
    ],
)
def test_bad_write(options, error, message):
    with pytest.raises(error, match=message):
        rotate_keys_write(**{"key": KEY, "frame_mean": MEAN, "places": torch.tensor([1, 2]), "pool": POOL, **options})

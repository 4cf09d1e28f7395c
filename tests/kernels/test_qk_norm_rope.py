import loops
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import cases

from memflow_kernels import Pool, frame_means, qk_norm_rope, qk_norm_rope_write
from memflow_kernels.reference import qk_norm_rope_write as write_reference
from memflow_kernels.reference import rms_norm, rotate_3d
from memflow_kernels.reference.qk_norm_rope import _store_by_index
from memflow_kernels.testing import Traffic, assert_close, draw, poisoned_memory, states

KERNELS = settings.get_profile("kernels")
BACKENDS = pytest.mark.usefixtures("backend")
FEW = settings(KERNELS, max_examples=10)  # the interpreter takes long over a row of hundreds of operations
ROUNDINGS = 3  # norm, weight, rotation
STARTS = st.sampled_from([0, 1, 57, 1023, 1024, 100_000])


def weights(case):
    drawn = draw(torch.randn, 2, case.heads * case.head_dim, dtype=torch.float64, seed=case.seed) + 1
    return drawn.to(case.dtype)


def grid_of(case):
    """(rows, cols) of tokens_per_frame tokens."""
    rows = 2 if case.tokens_per_frame % 2 == 0 else 1
    return rows, case.tokens_per_frame // rows


def slot_tensor(*slots):
    return torch.tensor(slots, dtype=torch.int32)


@BACKENDS
@FEW
@given(cases(head_dims=(2, 4, 8, 20, 24)), STARTS, st.booleans())
def test_equals_the_loop(case, start_frame, on_device):
    query, key = case.key(), case.states(case.frames * case.tokens_per_frame, 3)
    weight_q, weight_k = weights(case)
    options = {"weight_q": weight_q, "weight_k": weight_k, "eps": 1e-6, "grid": grid_of(case)}
    start = torch.tensor(start_frame) if on_device else start_frame
    with poisoned_memory():
        new_query, new_key = qk_norm_rope(query, key, start_frame=start, **options)
    for actual, x, weight in ((new_query, query, weight_q), (new_key, key, weight_k)):
        assert actual.dtype == case.dtype
        expected = loops.norm_rope(x, weight, 1e-6, grid_of(case), start_frame)
        assert_close(actual, torch.from_numpy(expected), roundings=ROUNDINGS)


@BACKENDS
@FEW
@given(cases(head_dims=(2, 4, 8, 20, 24)), STARTS, st.data())
def test_write_equals_the_functional_op(case, start_frame, data):
    tokens = case.frames * case.tokens_per_frame
    query, key, value = (case.states(tokens, salt) for salt in (1, 3, 4))
    weight_q, weight_k = weights(case)
    slots = data.draw(st.permutations(range(case.frames + 2)))[: case.frames]
    stored = data.draw(st.lists(st.booleans(), min_size=case.frames, max_size=case.frames))
    slots = [slot if keep else -1 for slot, keep in zip(slots, stored, strict=True)]
    pool = Pool(
        case.states((case.frames + 2) * case.tokens_per_frame, 5).contiguous(),
        case.states((case.frames + 2) * case.tokens_per_frame, 6).contiguous(),
        states(case.batch, case.frames + 2, case.heads, case.head_dim, dtype=case_statistics(case), seed=7),
    )
    before = Pool(*(part.clone() for part in pool))
    options = {"weight_q": weight_q, "weight_k": weight_k, "eps": 1e-6, "grid": grid_of(case)}
    with poisoned_memory():
        written, query_mean = qk_norm_rope_write(
            query, key, value, start_frame=start_frame, pool=pool, slots=slot_tensor(*slots), query_mean=True, **options
        )
        alone = qk_norm_rope_write(
            query, key, value, start_frame=start_frame, pool=pool, slots=slot_tensor(*slots), **options
        )
    assert torch.equal(written, alone)
    assert_close(query_mean, written.double().mean(1))
    new_query, new_key = qk_norm_rope(query, key, start_frame=start_frame, **options)
    assert torch.equal(written, new_query)
    by_frame = (-1, case.tokens_per_frame)
    for slot in range(case.frames + 2):
        parts = [pool.key.unflatten(1, by_frame)[:, slot], pool.value.unflatten(1, by_frame)[:, slot]]
        if slot in slots:
            frame = slots.index(slot)
            new = new_key.unflatten(1, by_frame)[:, frame]
            assert_close(parts[0], new)
            assert torch.equal(parts[1], value.unflatten(1, by_frame)[:, frame])
            assert_close(pool.frame_mean[:, slot], frame_means(parts[0].double(), case.tokens_per_frame)[:, 0])
        else:
            assert torch.equal(parts[0], before.key.unflatten(1, by_frame)[:, slot])
            assert torch.equal(parts[1], before.value.unflatten(1, by_frame)[:, slot])
            assert torch.equal(pool.frame_mean[:, slot], before.frame_mean[:, slot])


def case_statistics(case):
    return torch.float64 if case.dtype == torch.float64 else torch.float32


@KERNELS
@given(st.lists(st.integers(-1, 4), min_size=1, max_size=5, unique_by=lambda slot: slot if slot >= 0 else object()))
def test_the_store_of_other_devices(slots):
    """Index operations in place of a loop over slots read on the host."""
    new, held = states(2, len(slots), 3, 4), states(2, 5, 3, 4, seed=1)
    expected = held.clone()
    for frame, slot in enumerate(slots):
        if slot >= 0:
            expected[:, slot] = new[:, frame]
    _store_by_index(new, held, slot_tensor(*slots))
    assert torch.equal(held, expected)


@BACKENDS
@pytest.mark.parametrize(("dtype", "units"), [(torch.bfloat16, 1), (torch.float16, 1), (torch.float32, 3)], ids=str)
def test_within_few_units_of_the_specification(dtype, units):
    """The op rotates in float32 with turns from float64; the specification rotates in float64 throughout.

    In half precision that is the last rounding at most; in float32 the turn, the product and the norm round as well.
    """
    query, key = (states(1, 30, 2, 128, dtype=dtype, seed=seed) for seed in (0, 1))
    weight = states(1, 1, 1, 256, dtype=dtype, seed=2).flatten()
    options = {"weight_q": weight, "weight_k": weight, "eps": 1e-6, "grid": (3, 5), "start_frame": 1022}
    for actual, x in zip(qk_norm_rope(query, key, **options), (query, key), strict=True):
        exact = rotate_3d(rms_norm(x.flatten(2), weight, 1e-6).view(x.shape), (3, 5), 1022)
        pair = exact.double().unflatten(-1, (-1, 2)).norm(dim=-1, keepdim=True).expand(-1, -1, -1, -1, 2).flatten(-2)
        assert ((actual.double() - exact.double()).abs() <= units * torch.finfo(dtype).eps * pair).all()


@BACKENDS
def test_frame_100000_is_as_exact_as_frame_0():
    x = states(1, 1, 1, 128)
    for start_frame in (0, 1024, 100_000):
        expected = loops.norm_rope(x, torch.ones(128), 0.0, (1, 1), start_frame)
        options = {"weight_q": torch.ones(128), "weight_k": torch.ones(128), "eps": 0.0, "grid": (1, 1)}
        actual, _ = qk_norm_rope(x, x, start_frame=start_frame, **options)
        assert (actual.double().cpu() - torch.from_numpy(expected)).abs().max() < 1e-6


@BACKENDS
@pytest.mark.parametrize(
    ("grid", "heads", "head_dim", "layout", "dtype"),
    [
        ((4, 6), 3, 20, "fused", torch.float32),
        ((1, 7), 3, 24, "heads_first", torch.bfloat16),
        ((4, 6), 3, 128, "padded", torch.bfloat16),
    ],
)
def test_odd_sizes_and_layouts(grid, heads, head_dim, layout, dtype):
    """Forward, write and backward against float64; a frame of 24 tokens is more than one program's run."""
    tokens = 2 * grid[0] * grid[1]
    query, key, value = (states(2, tokens, heads, head_dim, dtype=dtype, layout=layout, seed=seed) for seed in range(3))
    weight_q, weight_k = (states(1, 1, heads, head_dim, dtype=dtype, seed=seed, mean=1.0).flatten() for seed in (3, 4))
    place = {"eps": 1e-6, "grid": grid, "start_frame": 1023}
    results = []
    for inputs in ((query, key, weight_q, weight_k), (x.double() for x in (query, key, weight_q, weight_k))):
        leaves = [x.detach().requires_grad_() for x in inputs]
        with poisoned_memory():
            outputs = qk_norm_rope(*leaves[:2], weight_q=leaves[2], weight_k=leaves[3], **place)
            weights_ = (value.to(x.dtype) for x in outputs)
            loss = sum((x * w).sum() for x, w in zip(outputs, weights_, strict=True))
            results.append((*outputs, *torch.autograd.grad(loss, leaves)))
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, roundings=ROUNDINGS)
    pool = Pool.zeros(2, 3, grid[0] * grid[1], heads, head_dim, dtype=dtype, device=query.device)
    with poisoned_memory():
        qk_norm_rope_write(
            query, key, value, weight_q=weight_q, weight_k=weight_k, pool=pool, slots=slot_tensor(2, 0), **place
        )
    new_key = torch.cat([results[0][1].unflatten(1, (2, -1))[:, frame] for frame in (1, 0)], 1)
    frames = [part.unflatten(1, (3, -1))[:, (0, 2)].flatten(1, 2) for part in pool[:2]]
    assert_close(frames[0], new_key)
    assert torch.equal(frames[1], value.unflatten(1, (2, -1))[:, (1, 0)].flatten(1, 2))
    assert_close(pool.frame_mean, frame_means(pool.key.double(), grid[0] * grid[1]))


@BACKENDS
@pytest.mark.parametrize("start", [0, 1, 57, 1023, 65_536, 100_000, 16_777_217, 2_000_000_000])
def test_angles_at_any_frame(start):
    """Unit channel pairs come back as (cos, sin) of the angle, which float64 gives up to frame 2^31."""
    grid, head_dim = (5, 7), 128
    x = torch.tensor([1.0, 0.0]).repeat(head_dim // 2).expand(1, 35, 1, head_dim).contiguous()
    options = {"weight_q": torch.ones(head_dim), "weight_k": torch.ones(head_dim), "eps": 0.0, "grid": grid}
    x = x * 2**0.5  # so that the norm gives every pair the length sqrt(2)
    actual, _ = qk_norm_rope(x, x, start_frame=start, **options)
    expected = rotate_3d(x.double(), grid, start)
    assert (actual - expected).abs().max() < 4e-7 + start * 1e-15  # float64's own error grows with the angle


@BACKENDS
def test_zero_rows_stay_zero():
    x = torch.zeros(1, 4, 2, 4)
    weight = torch.ones(8)
    new, _ = qk_norm_rope(x, x, weight_q=weight, weight_k=weight, eps=1e-6, grid=(2, 2), start_frame=3)
    assert torch.equal(new, x)


@pytest.mark.parametrize(("slots", "runs"), [((12, 13, 14), [3]), ((12, 14, 13), [1, 1, 1]), ((-1, 0, 1), [2])])
def test_write_copies_each_value_once(slots, runs):
    """Straight into the pool, slots side by side together; nothing of the size of the pool is ever made."""
    tokens = 3 * 60
    query, key, value = (states(1, tokens, 2, 32, seed=seed) for seed in range(3))
    pool = Pool.zeros(1, 15, 60, 2, 32)
    weight = torch.ones(64)
    place = (1e-6, 6, 10, 3, None)
    with Traffic() as traffic:
        write_reference(query, key, value, weight, weight, *place, *pool, slot_tensor(*slots), False)
    frame, mean = value[:, :60].nbytes, pool.frame_mean[:, :1].nbytes
    copies = [size for name, size in traffic.written if name == "aten::copy_"]
    assert copies == [size * count for count in runs for size in (frame, mean)]
    assert max(size for _, size in traffic.written) <= query.nbytes


def test_stored_means_are_the_means_of_stored_keys():
    pool = Pool.zeros(2, 3, 4, 2, 8, dtype=torch.bfloat16)
    x, weight = states(2, 8, 2, 8, dtype=torch.bfloat16), torch.ones(16, dtype=torch.bfloat16)
    options = {"weight_q": weight, "weight_k": weight, "eps": 1e-6, "grid": (2, 2), "start_frame": 0}
    qk_norm_rope_write(x, x, x, pool=pool, slots=slot_tensor(2, 0), **options)
    assert torch.equal(pool.frame_mean, frame_means(pool.key, 4))

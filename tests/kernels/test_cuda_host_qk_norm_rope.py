"""qk_norm_rope_write by the CUDA kernel, run on the CPU."""

import loops
import pytest
import torch
from host_ops import run_of
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import cases

from memflow_kernels import reference
from memflow_kernels.testing import LAYOUTS, assert_close, draw, relative_error, states

KERNELS = settings(settings.get_profile("kernels"), max_examples=20)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STARTS = st.sampled_from([0, 1, 57, 1023, 1024, 100_000])


def weights(channels, dtype, seed):
    return (draw(torch.randn, 2, channels, dtype=torch.float64, seed=seed) + 1).to(dtype)


def check(host, states_, weights_, grid, start_frame, start, pool, slots, with_query_mean=True):
    """What the kernel writes agrees with float64; nothing else in the pool changes."""
    dtype, expected = states_[0].dtype, [part.double() for part in pool]
    memories = [run_of(part).clone() for part in pool]
    first = start_frame + (0 if start is None else int(start))
    arguments = (*states_, *weights_, 1e-6, *grid, start_frame, start)
    query, query_mean = host.qk_norm_rope_write(*arguments, *pool, slots, with_query_mean=with_query_mean)
    wide, _ = reference.qk_norm_rope_write(
        *(x.double() for x in (*states_, *weights_)), 1e-6, *grid, first, None, *expected, slots, False
    )
    by_torch_pool = [part.clone() for part in pool]
    place = (1e-6, *grid, first, None)
    by_torch, _ = reference.qk_norm_rope_write(*states_, *weights_, *place, *by_torch_pool, slots, False)
    results = zip((query, *pool[:2]), (by_torch, *by_torch_pool[:2]), (wide, *expected[:2]), strict=True)
    for actual, of_torch, right in results:
        error, allowed = relative_error(actual, right), 1.5 * relative_error(of_torch, right)
        assert error <= (1e-5 if dtype == torch.float32 else allowed)
    tokens = grid[0] * grid[1]
    stored = {slot: frame for frame, slot in enumerate(slots.tolist()) if 0 <= slot < pool[2].shape[1]}
    for slot in stored:
        held = pool[0][:, slot * tokens : (slot + 1) * tokens]
        assert_close(pool[2][:, slot], held.double().mean(1), dtype=torch.float32)
    if with_query_mean:
        assert_close(query_mean, query.double().mean(1), dtype=torch.float32)
    for part, memory in zip(pool, memories, strict=True):  # what was not to be written
        left = torch.ones(part.shape[:2], dtype=torch.bool)
        per_slot = part.shape[1] // pool[2].shape[1]
        for slot in stored:
            left[:, slot * per_slot : (slot + 1) * per_slot] = False
        before = memory.as_strided(part.shape, part.stride(), 0)
        assert torch.equal(part[left], before[left])


@KERNELS
@given(cases(head_dims=(2, 4, 8, 20, 24, 64), dtypes=DTYPES), STARTS, st.booleans(), st.booleans(), st.data())
def test_random_cases(host, case, start_frame, on_device, with_query_mean, data):
    tokens, frames = case.tokens_per_frame, case.frames
    states_ = [case.states(frames * tokens, salt) for salt in (1, 3, 4)]
    rows = 2 if tokens % 2 == 0 else 1
    places = data.draw(st.permutations(range(frames + 2)))[:frames]
    kept = data.draw(st.lists(st.booleans(), min_size=frames, max_size=frames))
    slots = torch.tensor([slot if keep else -1 for slot, keep in zip(places, kept, strict=True)], dtype=torch.int32)
    pool = [case.states((frames + 2) * tokens, salt) for salt in (5, 6)]
    pool.append(states(case.batch, frames + 2, case.heads, case.head_dim, layout="heads_first", seed=7))
    start = None
    if on_device:
        start = torch.tensor(start_frame, dtype=data.draw(st.sampled_from([torch.int32, torch.int64])))
    weights_ = weights(case.heads * case.head_dim, data.draw(st.sampled_from(DTYPES)), case.seed)
    first = 2 if on_device else start_frame
    check(host, states_, weights_, (rows, tokens // rows), first, start, pool, slots, with_query_mean)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("dtype", "heads", "head_dim", "grid"),
    [
        (torch.bfloat16, 3, 24, (10, 31)),  # 26 runs of tokens in 3 groups, the last one shorter
        (torch.bfloat16, 12, 128, (2, 7)),  # as many threads as the 1.3B model
        (torch.float32, 7, 128, (1, 3)),  # two vectors per thread
        (torch.float32, 13, 256, (1, 2)),  # more channels than 16-byte vectors serve
    ],
)
def test_sizes_that_take_other_paths(host, layout, dtype, heads, head_dim, grid):
    tokens = grid[0] * grid[1]
    states_ = [states(1, 2 * tokens, heads, head_dim, dtype=dtype, layout=layout, seed=seed) for seed in range(3)]
    pool = [states(1, 3 * tokens, heads, head_dim, dtype=dtype, layout=layout, seed=seed) for seed in (3, 4)]
    pool.append(states(1, 3, heads, head_dim, seed=5))
    slots = torch.tensor([2, 0], dtype=torch.int32)
    check(host, states_, weights(heads * head_dim, dtype, 6), grid, 100_000, None, pool, slots)


def test_rotation_at_any_frame(host):
    """Cosines and sines as of float64, at frame 100,000 as at frame 0."""
    for start in (0, 100_000, 2_000_000_000):
        x = states(1, 24, 1, 24, seed=1)
        x = x / x.square().mean((2, 3), keepdim=True).sqrt()
        weight, pool = torch.ones(24), [torch.zeros(1, 24, 1, 24), torch.zeros(1, 24, 1, 24), torch.zeros(1, 2, 1, 24)]
        slots = torch.tensor([0, 1], dtype=torch.int32)
        query, _ = host.qk_norm_rope_write(x, x, x, weight, weight, 0.0, 3, 4, start, None, *pool, slots)
        expected = reference.rotate_3d(x.double(), (3, 4), start)
        assert (query - expected).abs().max() < 4 * (4e-7 + start * 1e-15)


def test_the_order_of_blocks_does_not_change_a_bit(host):
    """Whichever block comes last and adds up what the others left."""
    x = [states(2, 2 * 310, 2, 24, seed=seed) for seed in range(3)]
    slots, results = torch.tensor([1, 0], dtype=torch.int32), []
    for last_block_first in (False, True):
        pool = [torch.zeros(2, 620, 2, 24), torch.zeros(2, 620, 2, 24), torch.zeros(2, 2, 2, 24)]
        weights_ = weights(48, torch.float32, 0)
        with host.machine(last_block_first=last_block_first):
            written = host.qk_norm_rope_write(*x, *weights_, 1e-6, 10, 31, 0, None, *pool, slots, with_query_mean=True)
        results.append((*written, *pool))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_frame_outside_the_pool_is_not_stored(host):
    x = states(1, 12, 2, 24)
    pool = [torch.full((1, 8, 2, 24), 3.0), torch.full((1, 8, 2, 24), 3.0), torch.full((1, 2, 2, 24), 3.0)]
    slots = torch.tensor([2, -1, 1], dtype=torch.int32)
    host.qk_norm_rope_write(x, x, x, *weights(48, torch.float32, 0), 1e-6, 2, 2, 0, None, *pool, slots)
    for part in pool:
        assert torch.equal(part[:, : part.shape[1] // 2], torch.full_like(part[:, : part.shape[1] // 2], 3.0))
    assert torch.equal(pool[1][:, 4:], x[:, 8:])


def test_equals_the_loop(host):
    x = states(2, 12, 3, 20, layout="fused")
    weight = weights(60, torch.float32, 1)
    pool = [torch.zeros(2, 12, 3, 20), torch.zeros(2, 12, 3, 20), torch.zeros(2, 2, 3, 20)]
    slots = torch.tensor([1, 0], dtype=torch.int32)
    query, _ = host.qk_norm_rope_write(x, x, x, *weight, 1e-6, 2, 3, 57, None, *pool, slots)
    assert_close(query, torch.from_numpy(loops.norm_rope(x, weight[0], 1e-6, (2, 3), 57)))


@pytest.mark.parametrize(("dtype", "heads", "head_dim"), [
    (torch.bfloat16, 6, 128), (torch.float32, 3, 20), (torch.float16, 13, 256), (torch.float32, 7, 128),
])  # fmt: skip
def test_heads_that_are_normed_already(host, dtype, heads, head_dim):
    """Rotated, written and averaged as after a norm that changes nothing: the same bits as the specification's."""
    states_ = [states(2, 24, heads, head_dim, dtype=dtype, layout="fused", seed=seed) for seed in range(3)]
    slots, results = torch.tensor([2, -1, 0, 1], dtype=torch.int32), []
    for run in (host.qk_norm_rope_write, reference.qk_norm_rope_write):
        pool = [torch.full((2, 18, heads, head_dim), torch.nan, dtype=dtype) for _ in range(2)]
        pool.append(torch.full((2, 3, heads, head_dim), torch.nan))
        written = run(*states_, None, None, 0.0, 2, 3, 57, None, *pool, slots, True)
        results.append((*written, *pool))
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected.double(), dtype=dtype if actual.dtype == dtype else torch.float32)
    assert torch.equal(results[0][3], results[1][3])

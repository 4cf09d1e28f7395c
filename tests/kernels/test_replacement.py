import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import cases

from memflow_kernels import Pool, replace_frame
from memflow_kernels.reference.replacement import replace_by_index
from memflow_kernels.testing import LAYOUTS, Traffic, states

KERNELS = settings.get_profile("kernels")
BACKENDS = pytest.mark.usefixtures("backend")


def filled(batch, slots, tokens_per_frame, heads, head_dim, dtype=torch.float32):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    key, value = (states(batch, slots * tokens_per_frame, heads, head_dim, dtype=dtype, seed=seed) for seed in (0, 1))
    return Pool(key, value, states(batch, slots, heads, head_dim, dtype=wide, seed=2))


def int32(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


@BACKENDS
@KERNELS
@given(cases(), st.data(), st.booleans())
def test_equals_the_loop(case, data, by_index):
    """Through the op on the CPU, and through the index operations that other devices use."""
    pool = filled(case.batch, case.frames, case.tokens_per_frame, case.heads, case.head_dim, case.dtype)
    expected = Pool(*(part.clone() for part in pool))
    numbers = st.lists(st.integers(-1, case.frames - 1), min_size=case.batch, max_size=case.batch)
    slot, source = data.draw(numbers), data.draw(numbers)
    for row, (to, from_) in enumerate(zip(slot, source, strict=True)):
        if to < 0 or from_ < 0:
            continue
        for token in range(case.tokens_per_frame):
            for part in (expected.key, expected.value):
                part[row, to * case.tokens_per_frame + token] = part[row, from_ * case.tokens_per_frame + token].clone()
        expected.frame_mean[row, to] = expected.frame_mean[row, from_].clone()
    (replace_by_index if by_index else replace_frame)(
        *((*pool,) if by_index else (pool,)), int32(*slot), int32(*source)
    )
    for actual, wanted in zip(pool, expected, strict=True):
        assert torch.equal(actual, wanted)


@BACKENDS
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("tokens", "head_dim"), [(24, 20), (7, 128)])
def test_any_layout(layout, tokens, head_dim):
    """One frame moves, whether it lies in one piece or not; rows with -1 and all other slots keep their content."""
    key, value = (states(3, 4 * tokens, 3, head_dim, layout=layout, seed=seed) for seed in (0, 1))
    pool = Pool(key, value, states(3, 4, 3, head_dim, layout="heads_first", seed=2))
    expected = [part.unflatten(1, (4, -1)).clone() for part in pool]
    for part in expected:
        part[0, 3] = part[0, 1]
    replace_frame(pool, int32(3, -1, 2), int32(1, 2, -1))
    for actual, wanted in zip(pool, expected, strict=True):
        assert torch.equal(actual.unflatten(1, (4, -1)), wanted)


@pytest.mark.parametrize("by_index", [False, True])
@pytest.mark.parametrize(("slot", "source"), [(0, 2), (2, 0)])
def test_the_first_slot_is_a_slot(slot, source, by_index):
    pool = filled(1, 3, 4, 2, 8)
    expected = pool.key.unflatten(1, (3, -1))[0, source].clone()
    assert not torch.equal(pool.key.unflatten(1, (3, -1))[0, slot], expected)
    (replace_by_index if by_index else replace_frame)(*((*pool,) if by_index else (pool,)), int32(slot), int32(source))
    assert torch.equal(pool.key.unflatten(1, (3, -1))[0, slot], expected)


def test_moves_one_frame_per_row():
    pool = filled(2, 15, 50, 2, 16)
    with Traffic() as traffic:
        replace_frame(pool, int32(0, 3), int32(14, 14))
    frame = pool.key[:1, :50].nbytes
    assert [size for _, size in traffic.written] == [frame, frame, pool.frame_mean[0, 0].nbytes] * 2


@BACKENDS
def test_opcheck():
    torch.library.opcheck(torch.ops.memflow.replace_frame, (*filled(2, 3, 2, 2, 4), int32(0, -1), int32(2, 1)))


@BACKENDS
def test_compiles_to_one_graph_for_every_slot():
    def replace(pool, slot, source):
        replace_frame(pool, slot, source)
        return pool.value * 2

    compiled = torch.compile(replace, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for slot, source in (((0, 1), (2, 2)), ((1, -1), (0, 2))):
            pools = [filled(2, 3, 2, 2, 4) for _ in range(2)]
            expected = replace(pools[0], int32(*slot), int32(*source))
            actual = compiled(pools[1], int32(*slot), int32(*source))
            pairs = zip((actual, *pools[1]), (expected, *pools[0]), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)


POOL = filled(2, 3, 2, 2, 4)


@pytest.mark.parametrize(
    ("pool", "slot", "source", "error", "message"),
    [
        (None, int32(0, 0), int32(1, 1), TypeError, "pool must be a memflow_kernels.Pool, got NoneType"),
        (POOL, 0, int32(1, 1), TypeError, "slot must be a torch.Tensor, got int"),
        (POOL, int32(0), int32(1, 1), ValueError, r"slot must be \[B\] = \[2\], got \[1\]"),
        (POOL, int32(0, 0), int32(1, 1).long(), TypeError, "source_slot must be int32, got torch.int64"),
        (POOL, int32(0, 0).to("meta"), int32(1, 1), ValueError, "slot must be on the device of pool.key"),
        (POOL, int32(0, 3), int32(1, 1), ValueError, r"slot is \[0, 3\]: .* 0 to 2"),
        (POOL, int32(0, 0), int32(1, -2), ValueError, r"source_slot is \[1, -2\]"),
        (POOL._replace(value=POOL.value[:, :4]), int32(0, 0), int32(1, 1), ValueError, "pool.value must be"),
        (POOL._replace(key=POOL.key.long()), int32(0, 0), int32(1, 1), TypeError, "pool.key must be float32"),
    ],
)
def test_bad_input(pool, slot, source, error, message):
    with pytest.raises(error, match=message):
        replace_frame(pool, slot, source)


def test_refuses_gradients():
    pool = POOL._replace(key=POOL.key.clone().requires_grad_())
    with pytest.raises(RuntimeError, match="replace_frame writes into the pool and has no gradient"):
        replace_frame(pool, int32(0, 0), int32(1, 1))

"""What only the Triton backend has: pieces of tiles, tensor descriptors, the gathered form, tiles cut per block."""

import gc
import weakref

import pytest
import torch

from memflow_kernels import reference
from memflow_kernels.backends import available_backends, implementation, interpreting
from memflow_kernels.testing import assert_close, draw, poisoned_memory, states

if available_backends()["triton"] is not None:
    pytest.skip(f"backend triton: {available_backends()['triton']}", allow_module_level=True)

from triton.tools.tensor_descriptor import TensorDescriptor

from memflow_kernels.triton import configs, descriptors, gather
from memflow_kernels.triton.attention_schedule import schedule
from memflow_kernels.triton.layouts import Layout
from memflow_kernels.triton.scratch import attend_beside_window

SIZES = {"tokens_per_frame": 24, "candidate_frames": 3, "scale": 0.25}


@pytest.fixture(autouse=True)
def _device():
    torch.set_default_device(None if interpreting() else "cuda")
    yield
    torch.set_default_device(None)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16 x 16, so that small tensors have many; tensor descriptors where the test wants them."""

    def use(**options):
        for kernel in configs.TABLE:
            if kernel.startswith("attention"):
                config = configs.Config({"BM": 16, "BN": 16}, **options)
                monkeypatch.setitem(configs.TABLE, kernel, {"any": config, configs.family(torch.device("cpu")): config})

    return use


def inputs(dtype=torch.float32, layout="dense", head_dim=24):
    return [
        states(1, n, 3, head_dim, dtype=dtype, layout=layout, seed=n + s, mean=s // 2)
        for s, n in enumerate((40, 120, 120))
    ]


def table(*blocks, places=2, seed=0):
    return draw(torch.randint, -1, 3, (1, 3, *blocks, places), seed=seed, dtype=torch.int32)


def compare(arguments, frame_table, query_block=None):
    """Kernels against the specification in float64, forward and backward."""
    sizes = (frame_table, *SIZES.values(), query_block)
    query = arguments[0]
    grads = [states(*query.shape, dtype=query.dtype, seed=7), states(1, 3, 40, 1, seed=8)[..., 0]]
    wide = [x.double() for x in arguments]
    expected = reference.memory_attention(*wide, *sizes)
    grads[1] = grads[1].masked_fill(expected[1] == -torch.inf, 0.0)
    with poisoned_memory():
        actual = implementation("memory_attention", "triton")(*arguments, *sizes)
        backward = implementation("memory_attention_backward", "triton")(*grads, *arguments, *actual, *sizes)
    wide_grads = [x.double() for x in grads]
    expected_grads = reference.memory_attention_backward(*wide_grads, *wide, *expected, *sizes)
    for ours, exact in zip((*actual, *backward), (*expected, *expected_grads), strict=True):
        assert_close(ours, exact, roundings=2)


@pytest.mark.parametrize("units", [1, 3, 50, 149])
@pytest.mark.parametrize("side_by_side", [4, 108, 132])
@pytest.mark.parametrize("tiles", [1, 5, 107, 132, 444])
def test_schedule_is_no_slower_than_one_program_per_tile(tiles, side_by_side, units):
    whole, pieces = schedule(tiles, units, side_by_side)
    rounds = -(-tiles // side_by_side)
    if pieces == 1:
        assert whole == tiles
    else:
        assert whole % side_by_side == 0
        assert 0 < tiles - whole < side_by_side
        assert 1 < pieces <= units
        work = whole // side_by_side * units + -(-(tiles - whole) * pieces // side_by_side) * -(-units // pieces)
        assert work < rounds * units


def test_schedule_of_the_shape_that_counts():
    """4680 queries x 12 heads on 132 multiprocessors: 3.36 rounds of work in less than 3.5; whole tiles take 4."""
    whole, pieces = schedule(37 * 12, 149, 132)
    assert whole == 396
    assert 3 + -(-48 * pieces // 132) / pieces < 3.5


@pytest.mark.parametrize("descriptors", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize(("dtype", "layout"), [(torch.float32, "fused"), (torch.bfloat16, "heads_first")], ids=str)
def test_pieces(small_tiles, descriptors, dtype, layout):
    """More tiles than programs side by side, and a remainder: some tiles are written whole, some in pieces."""
    small_tiles(descriptors=descriptors)
    compare(inputs(dtype, layout), table())


def test_layouts_that_descriptors_cannot_describe(small_tiles):
    small_tiles(descriptors=True)
    compare(inputs(layout="padded"), table(places=1))


def test_blocks_cut_tiles(small_tiles):
    """Blocks of 17 queries: tiles of 16 and 1 rows."""
    small_tiles()
    compare(inputs(), table(3), query_block=17)


def test_dense(small_tiles):
    small_tiles()
    compare(inputs(torch.float16), None)


@pytest.mark.parametrize("head_dim", [24, 96, 160], ids=str)
def test_head_sizes(head_dim):
    compare(inputs(head_dim=head_dim), table(places=1))


def test_gathered_frames():
    _, key, value = inputs(layout="sliced")
    places = table()
    with poisoned_memory():
        packed = gather.gather_frames(key, value, places, 24, 3)
    for states_, x in zip(packed, (key, value), strict=True):
        frames = x.unflatten(1, (5, 24))
        for h in range(3):
            chosen = [frames[0, max(f, 0), :, h] * (f >= 0) for f in places[0, h].tolist()]
            assert torch.equal(states_[0, :, h], torch.cat([*chosen, frames[0, 3, :, h], frames[0, 4, :, h]]))


@pytest.mark.parametrize("layout", ["dense", "heads_first"])
@pytest.mark.parametrize("seed", [0, 1])
def test_gathered_beside_the_window(layout, seed):
    """Only the scratch slots change; empty places are computed in place, whatever lay in the slots before."""
    dtype = torch.float32 if interpreting() else torch.bfloat16
    query = states(1, 40, 3, 24, dtype=dtype, seed=seed)
    key, value = (states(1, 7 * 24, 3, 24, dtype=dtype, layout=layout, seed=s, mean=s - 1) for s in (1, 2))
    scratch = slice(3 * 24, 5 * 24)
    key[:, scratch], value[:, scratch] = float("nan"), float("nan")
    before, frame_table = [key.clone(), value.clone()], table(seed=seed)
    assert (frame_table < 0).any()
    left = [i for i in range(7 * 24) if not 3 * 24 <= i < 5 * 24]
    expected = reference.memory_attention(
        *(x.double() for x in (query, key[:, left], value[:, left])), frame_table, *SIZES.values(), None
    )
    with poisoned_memory():
        actual = attend_beside_window("flash", query, key, value, frame_table, *SIZES.values())
    for part, wanted in zip(actual, expected, strict=True):
        assert_close(part, wanted, dtype=dtype, roundings=2)
    for part, old in zip((key, value), before, strict=True):
        assert torch.equal(part[:, left], old[:, left])
        assert not part[:, scratch].isnan().any()


@pytest.mark.parametrize("kernel", ["flash"])
def test_gathered_form(monkeypatch, kernel):
    """Dense attention over gathered frames, and again in place for the heads that have an empty place."""
    monkeypatch.setattr(configs, "CHOSEN", {"any": kernel})
    monkeypatch.setattr(configs, "DENSE", {"any": kernel})
    dtype = torch.float32 if interpreting() else torch.bfloat16
    for frame_table in (table(), table().clamp(min=0), table() * 0 - 1, None):
        compare(inputs(dtype), frame_table)


def test_descriptors_are_checked_once_per_layout_and_keep_nothing_alive(monkeypatch):
    """Another call, on other memory of the same layout, costs the host two dictionary look-ups per descriptor."""
    checks = []
    check = TensorDescriptor.__post_init__
    monkeypatch.setattr(TensorDescriptor, "__post_init__", lambda made: (checks.append(made), check(made))[1])

    def layout(x):
        return Layout(x.dtype, x.shape, x.stride(), x.data_ptr() % 16 == 0)

    key, value = torch.ones(1, 72, 5, 48), torch.full((1, 72, 5, 48), 2.0)
    forms = descriptors.key_forms(layout(key), layout(value), 24, 16)
    assert len(checks) == 4  # by frame and by token
    made = [form.of(x) for form, x in zip(forms, (key, value, key, value), strict=True)]
    assert len(checks) == 4
    assert [descriptor.base is x for descriptor, x in zip(made, (key, value, key, value), strict=True)] == [True] * 4
    assert made[0] == TensorDescriptor(key, [1, 5, 3, 24, 48], [17280, 48, 5760, 240, 1], [1, 1, 1, 16, 64])
    alive = weakref.ref(key)
    checks.clear()
    del key, made
    gc.collect()
    assert alive() is None
    narrow = layout(torch.zeros(1, 72, 5, 45))
    assert descriptors.key_forms(narrow, narrow, 24, 16) is None

"""The Gluon kernels of memory_attention against the specification in float64: on a GPU, or their source on the CPU."""

import random

import pytest
import torch

from memflow_kernels.backends import available_backends

if available_backends()["triton"] is not None:
    pytest.skip(f"backend triton: {available_backends()['triton']}", allow_module_level=True)
from memflow_kernels.triton import gluon

if not gluon.AVAILABLE:
    pytest.skip("this release of Triton has another Gluon", allow_module_level=True)

from gluon_attention import Call, small_tiles, table
from gluon_variants import VARIANTS

from memflow_kernels import reference
from memflow_kernels.backends import implementation
from memflow_kernels.testing import AttentionCase, attention_inputs, poisoned_memory


@pytest.fixture(autouse=True)
def _device():
    torch.set_default_device("cuda" if torch.cuda.is_available() else None)
    yield
    torch.set_default_device(None)


CHIPS = pytest.mark.parametrize("chip", ["sm90", "sm100"])


def random_call(seed: int, fewest: int) -> tuple[Call, int]:
    """A call with more queries than `fewest` in every block, which the kernel serves, and a number of stages."""
    chosen = random.Random(seed)
    frames = chosen.randint(1, 6)
    candidates = chosen.randint(0, frames)
    case = AttentionCase(
        name=f"seed {seed}",
        batch=chosen.randint(1, 2),
        queries=fewest + chosen.choice([1, 36, 64, 65, 136]),
        heads=chosen.randint(1, 3),
        head_dim=chosen.choice([64, 64, 128]),
        tokens_per_frame=chosen.choice([1, 7, 16, 24, 40]),
        frames=frames,
        candidate_frames=candidates,
        top_k=None,
    )
    query_block = chosen.choice([None, None, fewest + 2, fewest + 66])
    call = Call(
        case,
        dtype=chosen.choice([torch.bfloat16, torch.float16]),
        layout=chosen.choice(["dense", "sliced", "heads_first", "fused"]),
        scale=chosen.choice([0.125, 0.125, -0.2, 0.0]),
        query_block=query_block,
        seed=seed,
    )
    if candidates and chosen.random() < 0.8:
        blocks = None if query_block is None else -(-case.queries // query_block)
        call.frame_table = table(case, chosen.randint(0, 4), blocks, seed)
    else:
        call.query_block = None
    return call, chosen.choice([2, 3])


@CHIPS
@pytest.mark.parametrize(
    "seed", [*range(15), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(15, 100))], ids=str
)
def test_random_calls(seed, chip):
    call, stages = random_call(seed, {"sm90": 64, "sm100": 128}[chip])
    print(call)
    with small_tiles(chip, stages=stages, seed=seed) as kernel:
        call.check()
        assert kernel.programs


@CHIPS
def test_whole_tiles_and_pieces_with_everything_that_a_table_may_hold(chip):
    """Six tiles on four multiprocessors: two in pieces. Heads with no frame, one twice, an empty place in between."""
    case = AttentionCase("pieces", 1, {"sm90": 150, "sm100": 300}[chip], 3, 64, 24, 6, 3, None)
    frame_table = torch.tensor([[[-1, -1, -1], [2, 2, 0], [1, -1, 0]]], dtype=torch.int32)
    with small_tiles(chip) as kernel:
        Call(case, frame_table=frame_table).check()
    assert kernel.programs > 6


@CHIPS
def test_heads_without_a_key(chip):
    """No frames behind the candidates: a head with an empty table gives zeros and -inf, also in pieces."""
    case = AttentionCase("nothing", 2, 140, 2, 64, 40, 2, 2, None)
    frame_table = torch.tensor([[[-1, -1], [0, 1]], [[1, -1], [-1, -1]]], dtype=torch.int32)
    with small_tiles(chip):
        Call(case, frame_table=frame_table).check()
        Call(case, frame_table=frame_table[..., :0]).check()


@CHIPS
def test_frames_of_real_size(chip):
    """1560 tokens: 12 tiles of 128 keys and one of 24, with the stages that the chip has."""
    case = AttentionCase("real", 1, 150, 1, 128, 1560, 3, 2, None)
    with small_tiles(chip, keys=128, stages=3) as kernel:
        Call(case, frame_table=torch.tensor([[[1]]], dtype=torch.int32)).check()
    assert kernel.programs


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (Call(AttentionCase("x", 1, 70, 2, 64, 8, 2, 0, None), layout="padded"), "no descriptor"),
        (Call(AttentionCase("x", 1, 70, 2, 64, 8, 2, 0, None), dtype=torch.float32), "exact products"),
        (Call(AttentionCase("x", 1, 70, 2, 32, 8, 2, 0, None)), "another head size"),
        (Call(AttentionCase("x", 1, 64, 2, 64, 8, 2, 0, None)), "no query for the second group"),
        (Call(AttentionCase("x", 1, 70, 2, 64, 8, 0, 0, None)), "no key at all"),
        (Call(AttentionCase("x", 1, 0, 2, 64, 8, 2, 0, None)), "no query at all"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_calls_that_are_left_to_the_other_kernel(call, reason):
    with small_tiles() as kernel:
        call.check()
    assert not kernel.programs


def test_a_release_of_triton_with_another_gluon(monkeypatch):
    monkeypatch.setattr(gluon, "AVAILABLE", False)
    with small_tiles() as kernel:
        Call(AttentionCase("x", 1, 70, 2, 64, 8, 2, 0, None)).check()
    assert not kernel.programs


@pytest.mark.skipif(torch.cuda.is_available(), reason="only the stand-in knows the order of products")
def test_the_groups_take_turns():
    """Each gives out both its products of a tile, then it is the other's turn."""
    case = AttentionCase("turns", 1, 128, 4, 64, 40, 3, 0, None)
    with small_tiles(stages=3) as kernel:
        Call(case).check()
    for history in kernel.histories:
        assert history == ["attend 0", "attend 0", "attend 1", "attend 1"] * (len(history) // 4)
        assert history


@pytest.mark.skipif(torch.cuda.is_available(), reason="gluon_variants.py runs them on a GPU")
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_change_only_speed(name):
    changes, stages = VARIANTS[name]
    case = AttentionCase("variants", 1, 70, 2, 64, 40, 4, 2, None)
    with small_tiles(stages=stages, faults=changes):
        Call(case, frame_table=torch.tensor([[[0], [-1]]], dtype=torch.int32)).check()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU: the real shape takes too long without")
@CHIPS
def test_the_shape_that_counts(chip):
    """4680 queries, 12 heads, 3 of 6 frames and 9 more: whole tiles and pieces; every number, not only their norm."""
    case = AttentionCase("real", 1, 4680, 12, 128, 1560, 15, 6, 3)
    query, key, value = attention_inputs(case, dtype=torch.bfloat16, layout="heads_first")
    frame_table = table(case, 3)
    sizes = (1560, 6, 128**-0.5, None)
    with small_tiles(chip) as kernel, poisoned_memory():
        out, lse = implementation("memory_attention", "triton")(query, key, value, frame_table, *sizes)
        assert kernel.programs
    for head in range(12):
        heads = slice(head, head + 1)
        wide = [x[:, :, heads].double() for x in (query, key, value)]
        expected, expected_lse = reference.memory_attention(*wide, frame_table[:, heads], *sizes)
        torch.testing.assert_close(out[:, :, heads].double(), expected, atol=0.006, rtol=0.0)
        torch.testing.assert_close(lse[:, heads].double(), expected_lse, atol=1e-3, rtol=1e-4)

"""Faults planted in the Gluon kernel of memory_attention: the stand-in reports each, or the result is wrong."""

import pytest
import torch

from memflow_kernels.backends import available_backends

if available_backends()["triton"] is not None:
    pytest.skip(f"backend triton: {available_backends()['triton']}", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("the stand-in is for the CPU; on a GPU the kernel itself runs", allow_module_level=True)
from memflow_kernels.triton import gluon

if not gluon.AVAILABLE:
    pytest.skip("this release of Triton has another Gluon", allow_module_level=True)

from gluon_attention import Call, small_tiles

from memflow_kernels.testing import AttentionCase

WRONG = "relative error|infinite"
UNSEEN = "nothing has arrived"
CHANGED = "changed while its product was in flight"
EARLY = f"{UNSEEN}|{CHANGED}"
DEADLOCK = "deadlock: .*waits for"
MIXED = f"{WRONG}|{DEADLOCK}|under way|expects"

K_RELEASE = "mbarrier.arrive(k_read.index(stage))"
K_WAIT = "logits = warpgroup_mma_wait(1, deps=[logits_coming])"
V_RELEASE = "mbarrier.arrive(v_read.index(stage_before))"
V_WAIT = "acc = warpgroup_mma_wait(0, deps=[acc_coming])"
INDENT = "\n        "
TURN = "mbarrier.wait(my_turn, (unit - first & 1) ^ GROUP)"
FIRST_OF_PIECE = "left = tokens_per_frame - first % per_frame * BN"
STORED = "acc.to(out.dtype.element_ty), mask=(row < rows)"

# name -> what the source says, what it says with the fault, what is then reported
FAULTS = {
    "keys are not waited for": ("mbarrier.wait(k_loaded.index(stage), parity)", "pass", EARLY),
    "values are not waited for": ("mbarrier.wait(v_loaded.index(stage), parity)", "pass", EARLY),
    "queries are not waited for": ("mbarrier.wait(q_loaded, 0)", "pass", EARLY),
    "keys are never given back": (K_RELEASE, "pass", DEADLOCK),
    "values are never given back": (V_RELEASE, "pass", DEADLOCK),
    "the turn is not handed on": ("mbarrier.arrive(their_turn)", "pass", DEADLOCK),
    "one reader counts for both": (
        "k_read.index(i), count=2",
        "k_read.index(i), count=1",
        f"{CHANGED}|{DEADLOCK}",
    ),
    "a reader too many": ("v_read.index(i), count=2", "v_read.index(i), count=3", DEADLOCK),
    "a barrier is not initialised": ("mbarrier.init(k_loaded.index(i), count=1)", "pass", "not initialised"),
    "both groups wait for the same turn": (TURN, TURN.replace(" ^ GROUP", ""), DEADLOCK),
    "the first round waits for one before it": ("parity = 1  #", "parity = 0  #", DEADLOCK),
    "half the bytes of a tile": ("= BN * D * 2", "= BN * D", f"{DEADLOCK}|{UNSEEN}"),
    "half the bytes of the queries": ("q_loaded, 2 * ROWS", "q_loaded, ROWS", f"{EARLY}|expects|{DEADLOCK}"),
    "keys are given back too early": (f"{K_WAIT}{INDENT}{K_RELEASE}", f"{K_RELEASE}{INDENT}{K_WAIT}", CHANGED),
    "values are given back too early": (f"{V_WAIT}{INDENT}{V_RELEASE}", f"{V_RELEASE}{INDENT}{V_WAIT}", CHANGED),
    "logits are used before they are there": (K_WAIT, K_WAIT.replace("1", "2"), "before it has been waited for"),
    "the ends of frames are not masked": ("if left < BN:", "if left < 0:", WRONG),
    "one key too many at the end of a frame": ("(key < left)", "(key <= left)", WRONG),
    "every piece begins at the start of a frame": (FIRST_OF_PIECE, "left = tokens_per_frame", WRONG),
    "the table of the first head": ("* heads + head) * blocks", "* heads) * blocks", MIXED),
    "an empty place counts": ("((frames >= 0) &", "((frames >= -1) &", MIXED),
    "an empty place is fetched": ("if (frame >= 0) &", "if (frame >= -1) &", MIXED),
    "rows behind the last query are written": (STORED, STORED.replace("rows", "128"), f"{WRONG}|outside"),
    "sums are not made smaller": ("gl.convert_layout(shrink, gl.SliceLayout(1, SUMS))[:, None]", "1.0", WRONG),
    "a piece is written as a whole tile": ("-1, program - whole)", "-1, -1)", WRONG),
}

UNREADY = "read while a product writes|holds"
WRITTEN = "written while a product writes"
WEIGHED = "mbarrier.arrive(weighed)"
STORED_SHARES = "shares_tile.store(share.to(dtype))"

# the same for the kernel of Blackwell
FAULTS_BLACKWELL = {
    "logits are not waited for": ("mbarrier.wait(ready, unit - first & 1)", "pass", UNREADY),
    "shares are not waited for": ("mbarrier.wait(shares_ready.index(group), unit - first & 1)", "pass", UNREADY),
    "sums are not waited for": ("mbarrier.wait(ready, last - first & 1)", "pass", UNREADY),
    "keys are not waited for": ("mbarrier.wait(k_loaded.index(stage), parity)", "pass", EARLY),
    "values are not waited for": ("mbarrier.wait(v_loaded.index(stage), parity)", "pass", EARLY),
    "nobody says that the sums are complete": ("tcgen05_commit(logits_ready.index(group))", "pass", DEADLOCK),
    "shares are never announced": (WEIGHED, "pass", DEADLOCK),
    "shares are announced too early": (STORED_SHARES, f"{WEIGHED}; {STORED_SHARES}", f"{UNREADY}|{WRITTEN}|more than"),
    "keys are given back by one product": (
        "k_read.index(i), count=2",
        "k_read.index(i), count=1",
        f"{CHANGED}|{MIXED}",
    ),
    "values are never given back": ("mbarriers=[v_read.index(stage_before)]", "mbarriers=[]", DEADLOCK),
    "sums begin with what lies there": ("use_acc=unit > first", "use_acc=True", "holds nothing"),
    "sums forget the tiles before": ("use_acc=unit > first", "use_acc=False", WRONG),
    "sums are not made smaller": ("sums_tile.load(SUMS) * factor[:, None]", "sums_tile.load(SUMS)", WRONG),
    "the next tile is taken for this": ("next_left(left, unit + 1,", "next_left(left, unit,", WRONG),
}

CASE = AttentionCase("faults", 1, 70, 6, 64, 40, 5, 3, None)
TABLE = torch.tensor([[[0, 2], [1, -1], [2, 2], [-1, -1], [0, 1], [-1, 0]]], dtype=torch.int32)


CASES = {"sm90": CASE, "sm100": CASE._replace(queries=140)}


@pytest.mark.parametrize("chip", CASES)
@pytest.mark.parametrize("seed", range(3))
def test_without_a_fault(chip, seed):
    with small_tiles(chip, seed=seed):
        Call(CASES[chip], frame_table=TABLE).check()


@pytest.mark.parametrize(
    ("chip", "name"), [*(("sm90", name) for name in FAULTS), *(("sm100", name) for name in FAULTS_BLACKWELL)]
)
def test_caught(chip, name):
    """Within a few orders of events; most at the first."""
    is_, becomes, message = {"sm90": FAULTS, "sm100": FAULTS_BLACKWELL}[chip][name]
    with pytest.raises(AssertionError, match=message) as caught:
        for seed in range(4):
            with small_tiles(chip, seed=seed, faults=((is_, becomes),)):
                Call(CASES[chip], frame_table=TABLE).check()
    print(name, "->", caught.value)


def test_without_turns_the_order_is_another():
    """The result is right without turns, which only make it fast; the order of products shows it."""
    with small_tiles(faults=((TURN, "pass"),)) as kernel:
        Call(AttentionCase("turns", 1, 128, 4, 64, 40, 3, 0, None)).check()
    assert any(h != ["attend 0", "attend 0", "attend 1", "attend 1"] * (len(h) // 4) for h in kernel.histories)

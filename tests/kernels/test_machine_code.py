"""The bar for the attention forward on Hopper, read from its machine code: nothing waits that need not.

docs/kernels.md has the figures, those of the kernel that fails the bar among them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the package triton is not installed")

import machine_code

from memflow_kernels.triton import gluon
from memflow_kernels.triton.configs import SHARED_MEMORY

HERE = Path(__file__).parent
DEFAULT = ("bf16-128", "bf16-128-exact")
SLOW = ("fp16-128", "bf16-64", "fp16-64", "fp16-64-exact")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A function that gives cubin and resources of a variant; those of one kind are compiled together."""
    folder = tmp_path_factory.mktemp("cubins")
    found = {}

    def get(variant: str, together: tuple[str, ...]) -> tuple[bytes, dict]:
        if variant not in found:
            environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
            environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[1]), environment.get("PYTHONPATH", "")])
            command = [sys.executable, "-W", "ignore", HERE / "gluon_compile.py", folder, *together]
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            assert done.returncode == 0, done.stderr[-3000:]
            found.update(json.loads(done.stdout))
        return (folder / f"{variant}.cubin").read_bytes(), found[variant]

    return get


@pytest.mark.skipif(not gluon.AVAILABLE, reason="this release of Triton has another Gluon")
@pytest.mark.parametrize("variant", [*DEFAULT, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_the_forward_on_hopper(compiled, variant):
    """Both groups of warps meet the bar; exact: also where the compiler fuses no product with a sum by itself."""
    cubin, resources = compiled(variant, DEFAULT if variant in DEFAULT else SLOW)
    assert resources["kernel"] == "forward_sm90_kernel"
    code = machine_code.listing(cubin)
    readings = [machine_code.read(loop) for loop in machine_code.loops(code)]
    print(variant, resources, *readings, sep="\n")
    assert machine_code.spills(code) == resources["spilled"] == 0
    assert resources["shared"] <= SHARED_MEMORY["sm_90"]
    assert len(readings) == 2  # one loop of each group
    assert not [fault for reading in readings for fault in reading.faults()]
    for reading in readings:
        # one for keys, one for values, one for the turn; all of the softmax has a product beside it
        assert len(reading.barriers) == 3
        assert reading.overlapped == reading.exponentials


@pytest.mark.slow
@pytest.mark.skipif(not gluon.AVAILABLE, reason="this release of Triton has another Gluon")
def test_the_forward_on_blackwell_compiles(compiled):
    """Products by tcgen05, and it fits; a few numbers of a program are kept on the stack, none of a loop's tensors."""
    variants = ("bf16-128-blackwell", "fp16-64-blackwell")
    for variant in variants:
        _, resources = compiled(variant, variants)
        print(variant, resources)
        assert resources["kernel"] == "forward_sm100_kernel"
        assert resources["tcgen05"]
        assert resources["shared"] <= SHARED_MEMORY["sm_100"]
        assert resources["spilled"] <= 32


@pytest.mark.slow
def test_the_pipelined_forward_is_read(compiled):
    """The kernel of triton/attention.py: what the bar says of it is printed, for docs/kernels.md."""
    cubin, resources = compiled("bf16-128-pipelined", ("bf16-128-pipelined",))
    readings = [machine_code.read(loop) for loop in machine_code.loops(machine_code.listing(cubin))]
    print(resources, *(f"{reading}: {reading.faults()}" for reading in readings), sep="\n")
    assert readings


def listing(*lines):
    return machine_code.parse("\n".join(f"/*{16 * i:04x}*/  {line} ;" for i, line in enumerate(lines)))


PRODUCT = "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR36], R24"
GOOD = (
    "MOV R1, c[0x0][0x28]",
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR54+0x38140], R22",  # 0x10: the head
    "@!P1 BRA 0x1b0",
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR54+0x38160], R22",
    *[PRODUCT] * 8,
    f"{PRODUCT}, gsb0",
    *[PRODUCT] * 2,
    f"{PRODUCT}, gsb0",
    "BAR.SYNC.DEFER_BLOCKING 0x0, 0x80",
    "WARPGROUP.DEPBAR.LE gsb0, 0x1",
    "@P1 BRA 0x150",
    "FSEL R85, R85, -INF , !P6",  # 0x130: of a masked tile
    "FSEL R86, R86, -INF , !P6",
    *["MUFU.EX2 R1, R1"] * 2,  # 0x150
    "WARPGROUP.DEPBAR.LE gsb0, 0x0",
    "F2FP.BF16.F32.PACK_AB R1, R2, R3",
    "@P2 BRA 0x10",  # 0x190
    "EXIT",
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR54+0x38140], R22",  # 0x1b0: tried again
    "@!P1 BRA 0x1b0",
    "BRA 0x30",
)


def faults(*code):
    (loop,) = machine_code.loops(listing(*code))
    return machine_code.read(loop).faults()


def replaced(old, new, times=-1):
    text = "\n".join(GOOD)
    assert old in text
    return text.replace(old, new, times).split("\n")


def test_paths_of_a_loop():
    (loop,) = machine_code.loops(listing(*GOOD))
    reading = machine_code.read(loop)
    assert (reading.full, reading.masked, reading.products) == (23, 25, 12)
    assert reading.barriers == ("0x38140", "0x38160")
    assert not reading.faults()


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("BLOCKING 0x0, 0x80", "BLOCKING 0x0", "1 block-wide barriers"),
        ("F2FP.BF16.F32.PACK_AB R1, R2, R3", "F2F.BF16.F32 R1, R2", "1 scalar conversions"),
        ("F2FP.BF16.F32.PACK_AB R1, R2, R3", "LDG.E R1, [R2]", "1 loads"),
        ("F2FP.BF16.F32.PACK_AB R1, R2, R3", "UTMALDG.4D [UR16], [UR4], desc[UR18]", "1 loads"),
        ("gsb0, 0x1", "gsb0, 0x0", "0 of 2 exponentials"),
        ("0x38160", "0x38140", "only 1 kinds of barriers"),
    ],
)
def test_what_is_below_the_bar(old, new, fault):
    (found,) = faults(*replaced(old, new))
    assert fault in found


def test_too_many_instructions(monkeypatch):
    monkeypatch.setattr(machine_code, "MOST_FULL", 22)
    monkeypatch.setattr(machine_code, "MOST_MASKED", 24)
    assert faults(*GOOD) == ["23 instructions for a full tile", "25 instructions for a masked tile"]


def test_spills():
    assert machine_code.spills(listing("STL [R1], R2", "LDL R2, [R1]", "EXIT")) == 2

"""Inputs that nobody would write, many of them: what is not refused in a sentence is a defect.

Each test tries some in `make test`, and goes on for MEMFLOW_FUZZ_SECONDS with that set:

    MEMFLOW_FUZZ_SECONDS=600 python -m pytest tests/fuzz
"""

import os
import re
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from memflow import MemFlowError

SECONDS = float(os.environ.get("MEMFLOW_FUZZ_SECONDS", 0))
PROCESSOR_SECONDS, MEMORY = 20.0, 2**30  # of one input: bounds, not what is usual
SETTINGS = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-(10**30), 10**30), st.floats(), st.text(max_size=20),
    st.sampled_from(["", "\x1b[2J", "\ud800", "../../x", "/dev/zero", "a" * 5000, "0", "1", "True", "NaN", "Infinity"]),
)  # fmt: skip
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def damaged(seeds: list[bytes]):
    """One of `seeds` with bytes changed, cut out, doubled or put in."""

    @st.composite
    def draw_one(draw):
        data = bytearray(draw(st.sampled_from(seeds)))
        for _ in range(draw(st.integers(1, 4))):
            at = draw(st.integers(0, len(data)))
            match draw(st.sampled_from(["set", "cut", "end", "double", "insert"])):
                case "set":
                    data[at : at + 1] = bytes([draw(st.integers(0, 255))])
                case "cut":
                    del data[at : at + draw(st.integers(1, 64))]
                case "end":
                    del data[at:]
                case "double":
                    data[at:at] = data[at : at + draw(st.integers(1, 64))]
                case "insert":
                    data[at:at] = draw(st.binary(max_size=16))
        return bytes(data)

    return draw_one()


def edited(value, draw):
    """A JSON value with one of its parts, drawn at any depth, left out or replaced by anything."""
    if isinstance(value, (dict, list)) and value and draw(st.integers(0, 3)):
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = draw(st.sampled_from(sorted(keys)))
        copy = value.copy()
        if draw(st.integers(0, 5)) == 0:
            del copy[key]
        else:
            copy[key] = edited(value[key], draw)
        return copy
    return draw(JSON)


def fuzz(inputs, use) -> None:
    """`use` every input: whatever is wrong with it is a MemFlowError of one line, within the bounds.

    Args:
        inputs: a hypothesis strategy.
        use: is called with an input.
    """
    met = Counter()

    def once(data) -> None:
        _forget_peak()
        before, begin = _kilobytes("VmRSS"), time.process_time()
        try:
            use(data)
            met["taken"] += 1
        except MemFlowError as error:
            assert "\n" not in str(error), str(error)
            met["refused"] += 1
        spent = time.process_time() - begin
        assert spent < PROCESSOR_SECONDS, f"{spent:.1f} s of the processor"
        grown = (_kilobytes("VmHWM") - before) * 1024
        assert grown < MEMORY, f"{grown / 2**20:.0f} MiB"

    end, number = time.monotonic() + SECONDS, 0
    while number == 0 or time.monotonic() < end:
        count = 300 if SECONDS else 60
        seed(number)(settings(max_examples=count, **SETTINGS)(given(inputs)(once)))()
        number += 1
    print(dict(met))
    assert met["refused"] > met.total() // 10, "the inputs reach what they are to test"


def _forget_peak() -> None:
    """VmHWM counts from now on."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _kilobytes(name: str) -> int:
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])

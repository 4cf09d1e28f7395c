"""Samples in turns, medians, pairs, the split of a time."""

import pytest
import torch

from memflow_bench import splits, timing
from memflow_bench.memory import peak_bytes

CPU = torch.device("cpu")


def test_samples_alternate():
    calls = []
    runs = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    rounds = list(timing.in_turns(runs, CPU, budget=0.0, least=3))
    assert calls == ["a", "b", "b", "a", "a", "b"]
    assert [sorted(samples) for samples in rounds] == [["a", "b"]] * 3


def test_a_budget_ends_the_rounds(monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))  # every look at it takes a second
    rounds = list(timing.in_turns({"a": lambda: None}, CPU, budget=30.0, cold=False))
    assert len(rounds) == 10  # of three seconds each
    assert len(list(timing.in_turns({"a": lambda: None}, CPU, budget=10**6, most=7))) == 7


def test_spread_and_ratio():
    assert timing.spread([4.0, 1.0, 3.0, 2.0, 5.0]) == pytest.approx({"median": 3.0, "p20": 1.8, "p80": 4.2})
    # Pair by pair: twice, four times and three times faster, whatever the mood of the machine.
    assert timing.ratio([1.0, 10.0, 2.0], [2.0, 40.0, 6.0]) == 3.0


def test_peak_memory_of_a_call():
    size = 64 * 2**20
    returned, peak = peak_bytes(lambda: torch.ones(size, dtype=torch.uint8), CPU)
    assert returned.numel() == size
    if peak is None:
        pytest.skip("this system does not tell a process its peak memory")
    assert 0.9 * size < peak < 2 * size


def test_a_split_is_exclusive(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(splits.time, "perf_counter", lambda: now[0])
    split = splits.Split(CPU)
    split.mark()
    with split.part("attention"):
        now[0] += 1
        with split.part("linear"):
            now[0] += 10
        now[0] += 2
    now[0] += 100
    split.mark()
    assert split.seconds() == {"attention": 3.0, "linear": 10.0, "rest": 100.0}

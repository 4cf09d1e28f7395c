"""Verdicts on times whose truth is known."""

import numpy as np
import pytest

from memflow_bench import load
from memflow_bench.verdict import compare_blocks, compare_rounds

COMPARISONS = 100


def launches(generator, faster=0.0, noise=0.04, start=0.004, follows=0.5, spoiled=0.02, blocks=40):
    """Two launches of blocks of two samples a side: a bias from start to start, a machine whose speed changes, noise,
    and samples that other work has spoiled."""
    found = []
    for _ in range(2):
        bias, speed, taken = generator.normal(0, start), 0.0, []
        for _ in range(blocks):
            speed = follows * speed + (1 - follows**2) ** 0.5 * generator.normal(0, 0.1)
            logs = speed + noise * generator.gumbel(size=(2, 2))
            logs += (generator.random((2, 2)) < spoiled) * generator.exponential(2.0, (2, 2))
            logs[0] += faster + bias
            taken.append(tuple(np.exp(logs)))
        found.append(taken)
    return found


def verdicts(**how):
    generator = np.random.default_rng(1)
    return [compare_blocks(launches(generator, **how)).verdict for _ in range(COMPARISONS)]


BUSY = {"noise": 0.2, "spoiled": 0.3, "blocks": 10}


@pytest.mark.parametrize("how", [{}, BUSY, BUSY | {"blocks": 20}, {"follows": 0.95}, {"start": 0.01}, {"blocks": 10}])
def test_the_same_is_no_difference(how):
    assert verdicts(**how).count("no difference") >= 0.95 * COMPARISONS


@pytest.mark.parametrize(("faster", "verdict"), [(0.05, "faster"), (-0.05, "slower")])
def test_five_percent_are_found_on_a_quiet_machine(faster, verdict):
    assert verdicts(faster=faster).count(verdict) >= 0.9 * COMPARISONS


def alike(*ratios):
    return [([ratio, ratio], [1.0, 1.0]) for ratio in ratios]


def test_launches_that_disagree_are_no_difference():
    assert compare_blocks([alike(*[1.2] * 10), alike(*[1.0] * 10)]).verdict == "no difference"


def test_the_interval_is_of_the_ratio():
    found = compare_blocks([alike(1.1, 1.11, 1.09, 1.1, 1.1, 1.105)] * 2)
    assert found.low <= found.faster <= found.high
    assert found.faster == pytest.approx(1.1, abs=0.01)
    assert found.half_width < 0.02


def test_samples_that_other_work_has_spoiled_move_nothing():
    blocks = [([1.05, 1.05 if n % 3 else 30.0], [1.0 if n % 2 else 20.0, 1.0]) for n in range(12)]
    assert compare_blocks([blocks] * 2).faster == pytest.approx(1.05)


def test_too_few_rounds_have_no_interval():
    assert compare_rounds([1.0, 1.0], [2.0, 2.0]) is None
    assert compare_rounds([1.0] * 6, [2.0] * 6).faster == pytest.approx(2.0)


def test_a_busy_machine_is_warned_of(monkeypatch):
    ticks = iter([(100, 200), (130, 300)])  # of 100 ticks 30 were idle
    monkeypatch.setattr(load, "_ticks", lambda: next(ticks))
    share = load.other_work(0.0)
    assert share == pytest.approx(0.7)
    assert "WARNING: other work keeps 70%" in load.warning(share)
    assert load.warning(0.05) is None
    assert load.warning(None) is None

"""Verdicts on times whose truth is known."""

import numpy as np
import pytest

from memflow_bench import load
from memflow_bench.verdict import compare_blocks, compare_rounds

COMPARISONS = 100


def launches(generator, faster=0.0, noise=0.01, start=0.004, follows=0.5, tails=False, blocks=12):
    """Two launches of log ratios: a bias from start to start, blocks that follow their neighbours, outliers."""
    found = []
    for _ in range(2):
        steps = generator.standard_t(2, blocks) if tails else generator.normal(size=blocks)
        for i in range(1, blocks):
            steps[i] = follows * steps[i - 1] + (1 - follows**2) ** 0.5 * steps[i]
        found.append(list(faster + generator.normal(0, start) + noise * steps))
    return found


def verdicts(**how):
    generator = np.random.default_rng(1)
    return [compare_blocks(launches(generator, **how)).verdict for _ in range(COMPARISONS)]


@pytest.mark.parametrize(
    "how", [{}, {"noise": 0.3, "tails": True, "blocks": 10}, {"noise": 0.05, "follows": 0.8}, {"start": 0.01}]
)
def test_the_same_is_no_difference(how):
    assert verdicts(**how).count("no difference") >= 0.95 * COMPARISONS


@pytest.mark.parametrize(("faster", "verdict"), [(0.05, "faster"), (-0.05, "slower")])
def test_five_percent_are_found_on_a_quiet_machine(faster, verdict):
    assert verdicts(faster=faster).count(verdict) >= 0.9 * COMPARISONS


def test_launches_that_disagree_are_no_difference():
    assert compare_blocks([[0.2] * 10, [0.0] * 10]).verdict == "no difference"


def test_the_interval_is_of_the_ratio():
    found = compare_blocks([[0.1, 0.11, 0.09, 0.1, 0.1, 0.105]] * 2)
    assert found.low <= found.faster <= found.high
    assert found.faster == pytest.approx(1.105, abs=0.002)
    assert found.half_width < 0.02


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

"""Inputs change in place between timed calls, and what is timed is checked: who does not follow gets no time."""

import pytest
import torch

from memflow_bench.experiments import Experiment
from memflow_bench.providers import PROVIDERS, Provider
from memflow_bench.runner import run_experiment
from memflow_bench.workloads import WORKLOADS

CPU = torch.device("cpu")
STATEFUL = {"update", "chunk"}  # a call changes what the next one sees


class Late(Provider):
    """Right at first, then not: `fault` says how."""

    name = "late"

    def __init__(self, fault: str):
        self.fault = fault

    def attention(self, state):
        honest = PROVIDERS["SDPA math"].attention(state)
        kept: list = []
        by_address: dict = {}

        def run():
            if self.fault == "knows tensors by their address":
                if state.query.data_ptr() not in by_address:
                    by_address[state.query.data_ptr()] = honest()
                return by_address[state.query.data_ptr()]
            kept.append(honest())
            if self.fault == "returns its previous output":
                return kept[max(len(kept) - 2, 0)]
            if self.fault == "raises in the third call" and len(kept) == 3:
                raise RuntimeError("out of memory")
            return kept[-1]

        return run


def rows(case, fault):
    experiment = Experiment("attention", case, "float32", modes=(False, True), budget=0.0, least=4)
    return run_experiment(experiment, [Late(fault), PROVIDERS["ours (torch)"]], CPU, say=lambda line: None)


@pytest.mark.parametrize("fault", ["knows tensors by their address", "returns its previous output"])
def test_stale_outputs_are_caught(tiny, fault):
    late, ours, *activated = rows(tiny, fault)
    assert (late.status, late.seconds) == ("wrong", [])
    assert "does not follow inputs that change in place" in late.reason
    assert (ours.status, len(ours.seconds)) == ("ok", 4)
    assert [row.status for row in activated] == ["wrong", "ok"]


def test_a_failure_while_timing_is_named_and_the_others_go_on(tiny):
    late, ours, *_ = rows(tiny, "raises in the third call")
    assert (late.status, late.reason, late.seconds) == ("failed", "RuntimeError: out of memory", [])
    assert len(ours.seconds) == 4


@pytest.mark.parametrize("name", sorted(set(WORKLOADS) - STATEFUL - {"block_causal", "block_causal_step"}))
def test_turning_changes_inputs_and_expectation_and_turns_back(tiny, name):
    workload = WORKLOADS[name](tiny, False, torch.float32, CPU)
    inputs = [x.clone() for x in workload.changing(workload.state)]
    expected = [x.clone() for x in workload.expected]
    assert workload.turns
    workload.turn()
    for before, now in zip(inputs, workload.changing(workload.state), strict=True):
        assert not torch.equal(before, now)
    assert not any(torch.equal(a, b) for a, b in zip(expected, workload.expected, strict=True) if name != "backward")
    workload.turn()
    assert all(torch.equal(a, b) for a, b in zip(inputs, workload.changing(workload.state), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(expected, workload.expected, strict=True))


@pytest.mark.parametrize("name", sorted(STATEFUL))
def test_what_changes_its_own_state_does_not_turn(tiny, name):
    assert not WORKLOADS[name](tiny, False, torch.float32, CPU).turns

"""A wrong result gets no time."""

import pytest
import torch

from memflow_bench.cases import case
from memflow_bench.experiments import Experiment
from memflow_bench.providers import PROVIDERS
from memflow_bench.providers.base import Provider
from memflow_bench.providers.ours import Ours
from memflow_bench.runner import run_experiment
from memflow_bench.states import our_memory
from memflow_bench.table import markdown
from memflow_kernels import memory_attention

CPU = torch.device("cpu")
FACTS = {"command": "c", "cpu": "a cpu", "cores": 1, "threads": 1, "torch": "2", "triton": None, "commit": "abc",
         "time": "now", "load_average": None}  # fmt: skip


class Broken(Provider):
    """Attention with one thing wrong."""

    name = "broken"

    def __init__(self, fault: str):
        self.fault = fault

    def attention(self, state):
        case = state.case

        def run():
            key, value = state.key, state.value
            if self.fault == "a frame is missing":
                key, value = key[:, case.tokens :], value[:, case.tokens :]
            if self.fault == "raises":
                raise RuntimeError("no kernel image\nand more")
            out = memory_attention(state.query, key, value, tokens_per_frame=case.tokens)
            if self.fault == "a token is not written":
                out[0, 1] = torch.nan
            if self.fault == "heads swapped":
                out = out.flip(2)
            return out[:, 1:] if self.fault == "a token too few" else out

        return run


def run(case, provider, workload="attention", dtype="float32", modes=(False,)):
    experiment = Experiment(workload, case, dtype, modes=modes, budget=0.0, least=2)
    providers = [provider, PROVIDERS["published path"]]
    return run_experiment(experiment, providers, CPU, say=lambda line: None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fault", ["a frame is missing", "heads swapped"])
def test_a_wrong_provider_has_no_time(tiny, fault, dtype):
    broken, published = run(tiny, Broken(fault), dtype=dtype)
    assert broken.status == "wrong"
    assert broken.error > broken.allowed
    assert broken.seconds == []
    assert published.status == "ok"
    assert len(published.seconds) == 2
    report = markdown(FACTS, {}, [broken, published])
    assert "broken - wrong: relative error" in report
    assert "| broken |" not in report
    assert "| published path | dense |" in report


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("a token is not written", "NaN"),
        ("raises", "RuntimeError: no kernel image"),
        ("a token too few", "returned shape"),
    ],
)
def test_a_failing_provider_has_a_reason(tiny, fault, reason):
    broken, published = run(tiny, Broken(fault))
    assert broken.status == "failed"
    assert reason in broken.reason
    assert broken.seconds == []
    assert published.status == "ok"


def test_a_provider_that_cannot_run_says_why(tiny):
    missing, _ = run(tiny, PROVIDERS["SDPA cudnn"])
    assert (missing.status, missing.reason, missing.seconds) == ("missing", "runs on a GPU only", [])


@pytest.mark.parametrize("workload", ["attention", "means", "write", "update", "layer", "chunk"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ours_and_the_published_path_are_right(tiny, workload, dtype):
    rows = run(tiny, PROVIDERS["ours (torch)"], workload, dtype, modes=(False, True))
    assert {(row.status, row.reason) for row in rows} == {("ok", "")}
    assert {len(row.seconds) for row in rows} == {2}


@pytest.mark.parametrize("name", ["SDPA flash", "SDPA math"])
def test_peers_are_right(tiny, name):
    rows = run(tiny, PROVIDERS[name], modes=(False, True))
    assert [row.status for row in rows] == ["ok"] * 4


def test_flex_masks_what_was_not_chosen(tiny, monkeypatch):
    """Uncompiled: compiling it takes longer than all other tests together."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    rows = run(tiny, PROVIDERS["FlexAttention"], modes=(False, True))
    assert [(row.status, row.reason) for row in rows] == [("ok", "")] * 4


@pytest.mark.parametrize("top_k", [5, 6])
def test_a_layer_that_activates_rows_is_right_and_others_are_not(top_k, monkeypatch):
    """The reference chooses blocks by itself: another number of them is wrong."""
    rows = case("toy-rows")
    memory = our_memory
    other = lambda state: memory(state._replace(top_k=state.top_k and top_k))  # noqa: E731
    monkeypatch.setattr("memflow_bench.providers.ours.our_memory", other)
    found = run_experiment(Experiment("layer", rows, "float32", budget=0.1), [Ours("torch")], CPU, say=lambda _: None)
    assert [(row.activated, row.status) for row in found] == [(False, "ok"), (True, "ok" if top_k == 5 else "wrong")]

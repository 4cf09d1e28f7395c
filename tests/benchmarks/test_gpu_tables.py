"""The tables of `make gpu-check` on a tiny model: the same calls as on a GPU, right results, planted faults found."""

import pytest
import torch

from benchmarks import gpu_calls, gpu_correct, gpu_speed
from memflow_kernels import available_backends, memory_attention, prompt_relevance

CPU = torch.device("cpu")
GROUPS = ["attention", "write", "frame_means", "relevance mean", "relevance softmax", "relevance token", "covering"]
GROUPS += ["selection", "replacement"]
# 70 tokens per frame: tiles of 64 have tails
TAILS = gpu_calls.TINY._replace(rows=5, cols=14, head_dim=64, dtype=torch.bfloat16)


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    reason = available_backends()[request.param]
    if reason is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    return request.param


def measured(ours, **options):
    return gpu_speed.measure(CPU, gpu_calls.TINY, ours, budget=0.01, **options)


def wrong_findings(backend, size):
    findings = []
    right = gpu_correct.check(size, CPU, {"ours": backend}, findings.append)
    wrong = [finding for finding in findings if not finding.right]
    assert right == (not wrong)
    return wrong


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.slow)], indirect=True)
def test_the_speed_table(backend):
    """Through Triton's interpreter the times mean nothing, the results must be right."""
    reported = []
    found = measured({"ours": backend}, report=lambda found: reported.append(len(found["rows"])))
    assert found["wrong"] == []
    rows = found["rows"]
    assert list(dict.fromkeys(row["group"] for row in rows)) == GROUPS
    assert len(reported) == len(GROUPS) and reported[-1] == len(rows)  # after every group
    timed = [row for row in rows if "reason" not in row]
    assert all(row["milliseconds"]["median"] > 0 for row in timed)
    assert len([row for row in timed if row["name"].startswith("ours")]) == 10
    assert len(gpu_speed.table(rows).splitlines()) == len(rows) + 1
    assert len(gpu_speed.targets(rows, found["ceilings"])) == 5


def test_a_row_for_every_backend():
    """With the compiled kernels present, each op is there once more."""
    found = measured({"ours": "torch", "ours (cuda)": "torch"})
    assert found["wrong"] == []
    named = [(row["group"], row["name"]) for row in found["rows"]]
    assert len(named) == len(set(named))
    assert {group for group, name in named if name.startswith("ours (cuda)")} == set(GROUPS)


def test_a_missing_peer_is_a_row_with_its_reason(monkeypatch):
    monkeypatch.setattr(gpu_speed, "GROUPS_OF_CALLS", (gpu_calls.attention_calls, gpu_calls.write_calls))
    rows = {row["name"]: row for row in measured({"ours": "torch"})["rows"]}
    for name in ("flash-attn 3, all 15", "flash-attn 4, all 15", "FlexAttention FLASH, all 15"):
        assert rows[name]["reason"] == "runs on a GPU only"
    assert "runs on a GPU only" in gpu_speed.table([rows["FlashInfer norm + rotation"]])


def test_a_failing_peer_is_a_row_and_ends_nothing(monkeypatch):
    def fails(peer, state):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(gpu_calls.Sdpa, "attention", fails)
    monkeypatch.setattr(gpu_speed, "GROUPS_OF_CALLS", (gpu_calls.attention_calls, gpu_calls.write_calls))
    found = measured({"ours": "torch"})
    row = next(row for row in found["rows"] if row["name"] == "SDPA flash, all 15")
    assert row["reason"] == "RuntimeError: no kernel image is available"
    assert found["wrong"] == [] and found["rows"][-1]["group"] == "frame_means"


def test_a_wrong_result_gets_no_time(monkeypatch):
    good = gpu_calls.update_calls
    wrong = lambda *args: [call._replace(expected=call.expected + 1) for call in good(*args)]  # noqa: E731
    monkeypatch.setattr(gpu_speed, "GROUPS_OF_CALLS", (gpu_calls.write_calls, wrong))
    found = measured({"ours": "torch"})
    assert len(found["wrong"]) == 6
    assert {row["group"] for row in found["rows"] if "milliseconds" in row} == {"write", "frame_means"}


def test_when_the_time_is_used_up_the_rest_are_rows():
    rows = measured({"ours": "torch"}, seconds=-1.0)["rows"]
    assert {row["reason"] for row in rows if row["name"].startswith("ours")} == {"the time of this step was used up"}


def test_no_target_is_met_by_nothing():
    assert gpu_speed.targets([], {}) == {"the attention was measured": False}


def test_right_results_are_right(backend):
    assert not wrong_findings(backend, gpu_calls.TINY)


def one_row(out, lse):
    out[0, -1, -1] *= 1.02


def one_log_sum_exp(out, lse):
    lse[0, 1, 7] += 1e-3


def one_channel_of_another_head(out, lse):
    out[0, :, 0, 5] = out[0, :, 1, 5]


def one_not_a_number(out, lse):
    out[0, 5, 0, 0] = float("nan")


@pytest.mark.parametrize("fault", [one_row, one_log_sum_exp, one_channel_of_another_head, one_not_a_number])
def test_small_faults_are_found(monkeypatch, fault):
    def broken(*arguments, **options):
        out, lse = memory_attention(*arguments, **options)
        fault(out, lse)
        return out, lse

    monkeypatch.setattr(gpu_correct, "memory_attention", broken)
    assert wrong_findings("torch", TAILS)


def test_a_wrong_relevance_is_found(monkeypatch):
    monkeypatch.setattr(gpu_correct, "prompt_relevance", lambda *x, **options: prompt_relevance(*x, **options) + 1e-3)
    assert len(wrong_findings("torch", TAILS)) == 1


def test_one_value_too_few_is_found(monkeypatch):
    """The value of the last of 1050 tokens is left out: in a norm over all numbers that would drown."""

    def broken(query, key, value, **options):
        value = value.clone()
        value[:, -1] = 0
        return memory_attention(query, key, value, **options)

    assert not wrong_findings("torch", TAILS)
    monkeypatch.setattr(gpu_correct, "memory_attention", broken)
    assert wrong_findings("torch", TAILS)

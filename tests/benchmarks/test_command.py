"""The command line, on experiments that take no time."""

import pytest
import torch

from memflow_bench import command, streams
from memflow_bench.cases import case
from memflow_bench.experiments import Experiment, StreamExperiment
from memflow_bench.rows import read
from memflow_bench.suites import SUITES, suite

TOY = case("toy")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", SUITES)
def test_a_suite_names_an_experiment_once(name, device):
    titles = [experiment.title for experiment in suite(name, device, ("torch",))]
    assert titles
    assert len(set(titles)) == len(titles)


def test_run_measures_checks_and_writes(tmp_path, monkeypatch, capsys):
    experiments = [
        Experiment("means", TOY, "float32", budget=0.0),
        Experiment("attention", TOY, "float32", budget=0.0, only=("ours (torch)", "SDPA cudnn", "published path")),
        StreamExperiment(TOY, modes=(False,), budget=0.0, least=1),
    ]
    monkeypatch.setattr(command, "suite", lambda *arguments: experiments)
    monkeypatch.setattr(streams, "CHUNKS", 2)
    monkeypatch.setattr(command, "ceilings", lambda *arguments: {"flops": 1e11, "bytes": 1e10})
    threads = torch.get_num_threads()
    file = tmp_path / "results" / "toy.json"
    assert command.main(["run", "--device", "cpu", "--threads", str(threads), "-o", str(file)]) == 0
    facts, _, rows, cases = read(file)
    assert cases["toy"] == TOY
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == threads
    timed = {(row.workload, row.provider) for row in rows if row.seconds}
    told = {("stream", name) for name in ("ours (torch)", "published path", "no memory attention at all")}
    assert told | {("attention", "published path")} <= timed
    out = capsys.readouterr().out
    assert "toy stream, against the published path" in out
    assert "SDPA cudnn - missing: runs on a GPU only" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workloads", "sort"], "sort not in this suite"),
        (["--providers", "nobody"], "none of ours (torch)"),
    ],
)
def test_a_wrong_wish_is_named(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(command, "suite", lambda *_: [Experiment("means", TOY, "float32", budget=0.0)])
    monkeypatch.setattr(command, "ceilings", lambda *_: {"flops": 1e11, "bytes": 1e10})
    assert command.main(["run", "--device", "cpu", *arguments]) == 2
    assert message in capsys.readouterr().out

"""Two sides in processes of their own: builds, providers, what fails, and the selftest."""

import json
import re
import subprocess
from types import SimpleNamespace

import pytest
import torch

from memflow_bench import against, command, selftest, sides
from memflow_bench.cases import case
from memflow_bench.experiments import Experiment
from memflow_bench.sides import INSTALLED, two_sides
from memflow_bench.verdict import Comparison

CPU = torch.device("cpu")
EXPERIMENTS = [Experiment("attention", case("toy"), "float32", modes=(True,), budget=0.0)]
PROVIDERS = """
import time
import torch.nn.functional as F
from memflow_bench.providers import Provider, keys_and_values

class Old(Provider):
    name = "old"
    pause = 0.002
    def attention(self, state):
        def run():
            states = (x.transpose(1, 2) for x in (state.query, *keys_and_values(state)))
            end = time.perf_counter() + self.pause
            while time.perf_counter() < end:
                pass
            return F.scaled_dot_product_attention(*states).transpose(1, 2)
        return run

class New(Old):
    name = "new"
    pause = 0.0

class Stale(Old):
    name = "stale"
    def attention(self, state):
        kept = []
        run = super().attention(state)
        return lambda: kept[0] if kept else kept.append(run()) or kept[0]

class Hangs(Old):
    name = "hangs"
    def attention(self, state):
        time.sleep(600)

class Dies(Old):
    name = "dies"
    def attention(self, state):
        import os
        return lambda: os._exit(3)
"""


@pytest.fixture(autouse=True)
def short(monkeypatch, tmp_path):
    monkeypatch.setenv("OMP_PROC_BIND", "false")  # tests may run side by side
    monkeypatch.setattr(against, "LAUNCHES", 1)
    monkeypatch.setattr(against, "LEAST", 5)
    (tmp_path / "mine.py").write_text(PROVIDERS)
    monkeypatch.chdir(tmp_path)


def compare(what, provider="ours", output=None):
    return against.compare(what, provider, EXPERIMENTS, CPU, cold=False, output=output, header="the machine")


def test_two_builds_are_compared(tmp_path, capsys):
    if subprocess.run(["git", "-C", str(INSTALLED), "rev-parse", "HEAD"], capture_output=True).returncode:
        pytest.skip("this is not a git checkout: there is no other build to compare with")
    assert compare("HEAD", output=tmp_path / "against.json") == 0
    out = capsys.readouterr().out
    assert re.search(r"\| attention toy float32, activated \| [^|]+s \| [^|]+s \| \S+x \(\S+ to \S+\) \| \w+", out)
    assert "the machine" in out
    [found] = json.loads((tmp_path / "against.json").read_text())["results"]
    [blocks] = found["launches"]
    assert len(blocks) >= 5
    assert {len(samples) for block in blocks for samples in block} == {2}


def test_a_folder_and_two_providers_of_a_file(capsys):
    other, this = two_sides(str(INSTALLED), "ours", None)
    assert (other.packages, this.packages, other.provider) == (INSTALLED, INSTALLED, "ours")
    assert compare("mine.py:Old", "mine.py:New") == 0
    out = capsys.readouterr().out
    assert re.search(r"\) \| faster \|", out)
    assert "| what | mine.py:Old | mine.py:New |" in out


@pytest.mark.parametrize(
    ("name", "message"), [("Stale", "wrong: relative error"), ("Dies", r"its process died \(exit code 3\)")]
)
def test_a_side_that_fails_is_named(name, message, capsys):
    assert compare(f"mine.py:{name}", "mine.py:New") == 1
    assert re.search(rf"failed: mine.py:{name}: .*{message}", capsys.readouterr().out)


def test_what_is_no_side_is_refused(capsys):
    wish = ["run", "--device", "cpu", "--workloads", "update", "--against"]
    assert command.main([*wish, "no-such-commit"]) == 2
    assert "--against no-such-commit: neither FILE.py:Name" in capsys.readouterr().out
    assert command.main([*wish, "HEAD", "--providers", "ours", "SDPA"]) == 2
    assert "name one" in capsys.readouterr().out
    assert command.main([*wish, ""]) == 2
    assert command.main([*wish[:3], "--suite", "realtime", "--against", str(INSTALLED)]) == 2
    out = capsys.readouterr().out
    assert "left out, as providers take no part in them: realtime quarter float32" in out
    assert "nothing that two sides could be compared in" in out


def test_a_side_that_hangs_is_ended(monkeypatch, tmp_path):
    """Ctrl-C reaches the process that waits for it."""
    monkeypatch.setattr(sides, "PATIENCE", 1)
    process = sides.Process(sides.Side("this", INSTALLED, "ours"), tmp_path / "side")
    wish = {"workload": "attention", "case": vars(case("toy")), "dtype": "float32", "activated": False}
    wish |= {"device": "cpu", "threads": 1, "cold": False, "provider": str(tmp_path / "mine.py:Hangs")}
    process.process.stdin.write(json.dumps({"prepare": wish}) + "\n")
    process.close()
    assert process.process.returncode == -9


def test_the_selftest_goes_through(monkeypatch, capsys):
    """Its short form: the processes and the lines. What it finds depends on the machine."""
    monkeypatch.setattr(selftest, "BUDGET", 0.2)
    selftest.selftest(1, "the machine")
    out = capsys.readouterr().out
    assert re.search(r"1 attention +itself \S+x .* \| 5 % slower \S+x", out)
    assert "against itself, 5% slower: found" in out


@pytest.mark.parametrize(
    ("same", "slowed", "code"),
    [("no difference", "slower", 0), ("faster", "slower", 1), ("no difference", "no difference", 1)],
)
def test_the_selftest_judges(monkeypatch, same, slowed, code):
    found = [SimpleNamespace(comparison=Comparison(1.0, 0.99, 1.01, verdict)) for verdict in (same, slowed)]
    monkeypatch.setattr(selftest, "measure", lambda *arguments, **options: found)
    assert selftest.selftest(20, "the machine") == code

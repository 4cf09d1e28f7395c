"""Providers that do what they must not: each has its reason, the others their times, and no traceback is printed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from memflow_bench import command
from memflow_bench.cases import case, load_cases, read_cases
from memflow_bench.experiments import Experiment
from memflow_bench.providers import PROVIDERS, Provider, keys_and_values
from memflow_bench.providers.choice import own_provider
from memflow_bench.runner import run_experiment

ROOT = Path(__file__).parents[2]


def attend(state):
    states = (x.transpose(1, 2) for x in (state.query, *keys_and_values(state)))
    return scaled_dot_product_attention(*states).transpose(1, 2)


def exits(state):
    raise SystemExit


def after(act):
    def run(state):
        out = attend(state)
        act(state)
        return out

    return run


FAULTS = {
    "nothing": (lambda state: None, "returned NoneType, needed a tensor"),
    "a tuple": (lambda state: (attend(state),), "returned tuple, needed a tensor"),
    "another dtype": (lambda state: attend(state).double(), "returned torch.float64, needed torch.float32"),
    "infinity": (lambda state: attend(state) / 0, "the result holds NaN or infinity"),
    "no shape": (lambda state: attend(state).sum(), "returned shape [], needed 192 tokens"),
    "exits": (exits, "SystemExit"),
    "query gone": (after(lambda state: state.query.zero_()), "wrote into 1 of its 4 inputs"),
    "keys and values gone": (after(lambda state: [x.neg_() for x in state[2:4]]), "wrote into 2 of its 4 inputs"),
}


class Hostile(Provider):
    name = "hostile"

    def __init__(self, call):
        self.call = call

    def attention(self, state):
        return lambda: self.call(state)


def run(provider, sizes, workload="attention"):
    experiment = Experiment(workload, sizes, "float32", modes=(True,), budget=0.0, least=2)
    providers = [provider, PROVIDERS["published path"]]
    return run_experiment(experiment, providers, torch.device("cpu"), say=lambda line: None)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_its_own(fault):
    call, reason = FAULTS[fault]
    hostile, published = run(Hostile(call), case("toy"))
    assert (hostile.status, hostile.seconds) == ("failed", [])
    assert reason in hostile.reason
    assert (published.status, published.reason, len(published.seconds)) == ("ok", "", 2)


def test_what_prepares_nothing_is_told_what_is_needed():
    class Plain(Provider):
        name = "plain"

        def attention(self, state):
            return attend(state)

    hostile, _ = run(Plain(), case("toy"))
    assert hostile.reason == "TypeError: attention(state) returned Tensor, needed a callable"


def test_late_exits_are_noticed():
    calls = []
    late = after(lambda state: calls.append(1) or len(calls) < 2 or sys.exit("later"))
    hostile, published = run(Hostile(late), case("toy"))
    assert (hostile.status, hostile.reason, hostile.seconds) == ("failed", "SystemExit: later", [])
    assert len(published.seconds) == 2


def test_a_case_without_what_a_workload_needs_costs_that_row_alone(tmp_path):
    file = tmp_path / "cases.json"
    file.write_text('{"bare": {"like": "toy", "heads": 1, "grid": [2, 3], "bank": 0}}')
    bare = read_cases(file, load_cases())["bare"]
    assert {(row.status, row.reason) for row in run(PROVIDERS["ours (torch)"], bare, "update")} == {
        ("missing", "ValueError: the case has no bank")
    }
    assert {row.status for row in run(PROVIDERS["ours (torch)"], bare, "layer")} == {"ok"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import sys; sys.exit()", "cannot be loaded: SystemExit"),
        ("import no_such_module", "cannot be loaded: ModuleNotFoundError"),
        ("def (", "cannot be loaded: SyntaxError"),
        ("X = 3", "X is not a memflow_bench.providers.Provider"),
        (
            "from memflow_bench.providers import Provider\nclass X(Provider):\n    name = 'a|b'\n"
            "    def attention(self, state): ...",
            "in one line without |",
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path, text, message):
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        own_provider(f"{file}:X")


def test_a_file_that_cannot_be_written_is_refused_before_minutes_of_measuring(tmp_path, capsys):
    (tmp_path / "file").touch()
    for output, message in [(tmp_path, "is a folder; needed: a file"), (tmp_path / "file" / "out.json", "file")]:
        assert command.main(["run", "--device", "cpu", "--workloads", "means", "-o", str(output)]) == 2
        assert message in capsys.readouterr().out


@pytest.mark.parametrize("wish", [["--threads", "0"], ["--threads", "-3"], ["--threads", "two"]])
def test_a_number_of_threads_that_is_none_is_refused(wish, capsys):
    with pytest.raises(SystemExit):
        command.main(["run", *wish])
    assert "is no number from 1 on" in capsys.readouterr().err


def test_who_hangs_can_be_stopped(tmp_path):
    """By Ctrl-C: the last line says what was running, and no traceback follows."""
    (tmp_path / "mine.py").write_text(
        "import os, signal, time\nfrom memflow_bench.providers import Provider\n"
        "class Hangs(Provider):\n    name = 'hangs'\n"
        "    def attention(self, state):\n        os.kill(os.getpid(), signal.SIGINT)\n        time.sleep(600)\n"
    )
    (tmp_path / "cases.json").write_text('{"one": {"like": "toy", "heads": 1, "grid": [2, 3]}}')
    wish = ["--providers", "mine.py:Hangs", "--cases", "cases.json", "--workloads", "attention", "--device", "cpu"]
    command_line = [sys.executable, "-m", "memflow_bench", "run", *wish]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command_line, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stdout.endswith("  hangs ...\nstopped\n")
    assert "Traceback" not in done.stderr

"""What the README tells a newcomer to type and to click works: code, commands, links, figures."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys

import pytest
from readme import COMMANDS, ELSEWHERE, EXAMPLES, MEASURING, README, ROOT, elsewhere, in_words, write_kernels


@pytest.mark.parametrize("code", EXAMPLES, ids=[str(i) for i in range(len(EXAMPLES))])
def test_example(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})


def test_commands(tmp_path):
    """In their order, in a folder that has what a clone has; with the words of the embedded model alone."""
    for name in ("examples", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    ran = [command for command in COMMANDS if not elsewhere(command) and MEASURING not in command]
    assert len(ran) >= 5
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment["OMP_NUM_THREADS"] = "1"  # threads that wait for one another are slow on a machine that has other work
    for command in ran:
        done = subprocess.run(
            in_words(command, sys.executable), cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        assert "does not know" not in done.stderr, f"{command}\n{done.stderr}"
    written = {word for command in ran for word in re.findall(r"-o (\S+)|--save-state (\S+)", command) for word in word}
    assert all((tmp_path / name).stat().st_size > 10_000 for name in written if name)
    assert (tmp_path / "friends.png").exists()  # --report


@pytest.mark.slow
def test_commands_that_measure(tmp_path):
    """Some seven minutes; with the kernels and cases of docs/benchmarks.md as the reader's own."""
    write_kernels(tmp_path)
    measured = [command for command in COMMANDS if MEASURING in command]
    assert len(measured) >= 3
    for command in measured:
        words = in_words(command, sys.executable)
        done = subprocess.run(
            words, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr}"
    assert (tmp_path / "quick.json").stat().st_size > 10_000


def test_every_command_is_run_or_has_a_reason():
    """Those that are run are programs of this project, and no pattern of ELSEWHERE has outlived its command."""
    assert {command.split()[0] for command in COMMANDS if not elsewhere(command)} <= {
        "memflow",
        "memflow-bench",
        "python",
    }
    for known in ELSEWHERE:
        assert any(re.match(known, command) for command in COMMANDS), known


def test_options():
    """Every option of every `memflow` command is one that the command has."""
    from memflow.cli.commands import app

    known = {
        command.callback.__name__: subprocess_help(command.callback.__name__) for command in app.registered_commands
    }
    for command in [*COMMANDS, *re.findall(r"`(memflow [a-z]+ --[^`]+)`", README)]:
        if command.startswith("memflow "):
            _, name, *words = shlex.split(command)
            unknown = [word for word in words if word.startswith("--") and word not in known[name]]
            assert not unknown, command


def subprocess_help(name: str) -> str:
    command = [sys.executable, "-m", "memflow", name, "--help"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")], ids=lambda page: page.name)
def test_links(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_make_targets():
    makefile = (ROOT / "Makefile").read_text()
    for target in [*re.findall(r"^make (\S+)", README, re.MULTILINE), *re.findall(r"`make (\S+?)`", README)]:
        assert f"\n{target}:" in makefile


def test_extras():
    project = (ROOT / "pyproject.toml").read_text()
    for command in COMMANDS:
        for extra in re.findall(r"pip install .*\[(\w+)\]", command):
            assert f"\n{extra} = [" in project, command


def test_figures_of_the_table_are_those_of_the_result():
    """Seconds as the committed result has them, and their ratios: like compared with like."""
    result = (ROOT / "benchmarks" / "results" / "cpu-layer.md").read_text()
    rows = re.findall(r"^\| (?:dense|top 3).*, (\w+) \| ([\d.]+) s \| ([\d.]+) s \| ([\d.]+)", README, re.MULTILINE)
    assert len(rows) == 4
    for number, (dtype, published, ours, times) in enumerate(rows):
        mode = ("dense", "activated")[number % 2]
        section = result.partition(f"layer wan-1.3b-480p {dtype}")[2].partition("###")[0]
        found = dict(re.findall(rf"^\| (ours \(torch\)|published path) \| {mode} \| ([\d.]+) s", section, re.MULTILINE))
        assert {name: float(value) for name, value in found.items()} == {
            "ours (torch)": float(ours),
            "published path": float(published),
        }
        assert abs(float(times) - float(published) / float(ours)) < 0.05  # the ratio is that of rounds

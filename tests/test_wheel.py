"""What a wheel gives in an empty folder: types, the README's Python and commands, no file of the repository."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from readme import COMMANDS, EXAMPLES, MEASURING, ROOT, elsewhere

BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """The Python of an environment that has the wheel, and behind it the packages of this one but not this clone."""
    for tool in ("setuptools", "pip"):
        if importlib.util.find_spec(tool) is None:  # imported here, setuptools would take the place of distutils
            pytest.skip(f"{tool} is not installed")
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"  # a build leaves folders behind
    named = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")
    for path in [ROOT / name for name in named] + [*ROOT.glob("memflow*/"), ROOT / "csrc", ROOT / "examples"]:
        if path.is_dir():
            shutil.copytree(path, tree / path.name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            tree.mkdir(exist_ok=True)
            shutil.copy(path, tree)
    built = subprocess.run([sys.executable, "-c", BUILD, str(folder)], cwd=tree, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    (packages,) = (folder / "venv").glob("lib/python*/site-packages")
    (packages / "behind.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (wheel,) = folder.glob("*.whl")
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "-q",
        "--no-index",
        "--ignore-installed",
        "--no-deps",
    ]
    installed = subprocess.run([*install, f"{wheel}[model,bench]"], capture_output=True, text=True)
    assert installed.returncode == 0, installed.stderr
    return python


def run(program: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([program, *words], cwd=folder, env=environment, capture_output=True, text=True)


def test_the_packages_are_those_of_the_wheel(python, tmp_path):
    code = "import memflow, memflow_kernels; print(memflow.__file__, memflow_kernels.__file__)"
    done = run(python, tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr
    for file in done.stdout.split():
        assert Path(file).is_relative_to(python.parents[1])
        assert (Path(file).parent / "py.typed").exists()


def test_the_python_of_the_readme(python, tmp_path):
    for block in EXAMPLES:
        done = run(python, tmp_path, "-c", block)
        assert done.returncode == 0, done.stderr


def test_the_commands_of_the_readme(python, tmp_path):
    """Those that need nothing of the clone, by the programs that the wheel installs."""
    named = re.compile(r"examples/|benchmarks/|examples\.|story\.state")  # the clone's, and what is made of it
    ran = [
        command
        for command in COMMANDS
        if not elsewhere(command) and MEASURING not in command and not named.search(command)
    ]
    assert {command.split()[0] for command in ran} == {"memflow", "memflow-bench"}
    for command in ran:
        program, *words = shlex.split(command)
        done = run(python.with_name(program), tmp_path, *words)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        assert "does not know" not in done.stderr, f"{command}\n{done.stderr}"
    assert (tmp_path / "bo.mp4").stat().st_size > 10_000

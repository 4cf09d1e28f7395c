"""What a wheel gives in an empty folder: the README's attention call, a story, types, no file of the repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """The Python of an environment that has the wheel, and behind it the packages of this one but not this clone."""
    pytest.importorskip("setuptools", reason="setuptools is not installed")
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
    (packages,) = (folder / "venv").glob("lib/python*/site-packages")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    (packages / "behind.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "venv" / "bin" / "python"


def run(python: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([python, *words], cwd=folder, env=environment, capture_output=True, text=True)


def test_the_packages_are_those_of_the_wheel(python, tmp_path):
    code = "import memflow, memflow_kernels; print(memflow.__file__, memflow_kernels.__file__)"
    done = run(python, tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr
    for file in done.stdout.split():
        assert Path(file).is_relative_to(python.parents[1])
        assert (Path(file).parent / "py.typed").exists()


def test_the_attention_call_of_the_readme(python, tmp_path):
    block = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    done = run(python, tmp_path, "-c", block)
    assert done.returncode == 0, done.stderr


def test_a_story(python, tmp_path):
    words = ["-p", "bo, a red star, waits on the beach.", "-o", "bo.mp4", "--seconds-per-prompt", "0.4"]
    done = run(python, tmp_path, "-m", "memflow", "generate", *words)
    assert done.returncode == 0, done.stderr
    assert "does not know" not in done.stderr
    assert (tmp_path / "bo.mp4").stat().st_size > 10_000

"""Type checkers see the types of everything public: mypy --strict and pyright, on a user's file and on his mistakes."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import memflow
import memflow.memory
import memflow_kernels

HERE = Path(__file__).parent
MISTAKES = [n for n, line in enumerate((HERE / "misuse.py").read_text().splitlines(), 1) if "# error" in line]


@pytest.fixture(scope="module")
def mypy() -> set[tuple[str, int]]:
    """(file, line) of what mypy refuses. One run over both files: it reads torch once."""
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("mypy is not installed: pip install -e '.[test]'")
    command = [sys.executable, "-m", "mypy", "--config-file", str(HERE / "mypy.ini")]
    cache = HERE.parents[1] / ".mypy_cache"  # a second run takes a second
    files = [str(HERE / "user.py"), str(HERE / "misuse.py")]
    run = subprocess.run([*command, "--cache-dir", str(cache), *files], capture_output=True, text=True)
    assert run.returncode in (0, 1), run.stderr + run.stdout
    print(run.stdout)
    return {(Path(name).name, int(line)) for name, line in re.findall(r"^(.+?\.py):(\d+): error:", run.stdout, re.M)}


@pytest.fixture(scope="module")
def pyright() -> set[tuple[str, int]]:
    """As mypy, from pyright."""
    if importlib.util.find_spec("pyright") is None:
        pytest.skip("pyright is not installed: pip install -e '.[test]'")
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable]
    run = subprocess.run([*command, str(HERE / "user.py"), str(HERE / "misuse.py")], capture_output=True, text=True)
    if not run.stdout.startswith("{"):
        pytest.skip(f"pyright does not start here (it fetches its program once): {run.stderr.strip()[-200:]}")
    print(run.stdout)
    found = json.loads(run.stdout)["generalDiagnostics"]
    return {(Path(x["file"]).name, x["range"]["start"]["line"] + 1) for x in found if x["severity"] == "error"}


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_a_users_file_is_clean(checker, request):
    assert not {place for place in request.getfixturevalue(checker) if place[0] == "user.py"}


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_mistakes_are_refused(checker, request):
    found = request.getfixturevalue(checker)
    assert {line for name, line in found if name == "misuse.py"} == set(MISTAKES)


def test_the_users_file_has_every_public_name():
    text = (HERE / "user.py").read_text()
    missing = [name for package in (memflow, memflow_kernels) for name in package.__all__ if name not in text]
    assert not missing


@pytest.mark.parametrize("package", [memflow, memflow.memory], ids=lambda package: package.__name__)
def test_lazy_names_are_those_that_type_checkers_see(package):
    """One list for Python, one for type checkers, which need it written out."""
    seen = {}
    for home, names in re.findall(r"^    from (memflow\S+) import (.+)$", Path(package.__file__).read_text(), re.M):
        seen |= dict.fromkeys(names.split(", "), home)
    homes = {name: home if "." in home else f"{package.__name__}.{home}" for name, home in package._HOME.items()}
    assert seen == homes
    assert {*homes, "__version__"} >= set(package.__all__) >= set(homes)
    for name in package.__all__:
        assert getattr(package, name) is not None


@pytest.mark.parametrize("package", [memflow, memflow_kernels], ids=lambda package: package.__name__)
def test_py_typed(package):
    assert (Path(package.__file__).parent / "py.typed").exists()

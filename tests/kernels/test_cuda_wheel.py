"""The three ways to install: Python files alone, which need no torch; with the sources; with the kernels compiled."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
from fake_nvcc import fake_nvcc

ROOT = Path(__file__).parents[2]
PACKED = (
    "pyproject.toml",
    "setup.py",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "csrc",
    "memflow",
    "memflow_kernels",
    "examples",
)
# A hidden package can neither be imported nor found.
HOOK = """
import importlib.util, sys
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in {hidden!r} else find_spec(name, *rest)
sys.modules.update(dict.fromkeys({hidden!r}))
from setuptools import build_meta
print(getattr(build_meta, {hook!r})({folder!r}))
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of what a package is made of: builds leave folders behind."""
    if find_spec("setuptools") is None:  # importing it fails where something has imported Python's own distutils
        pytest.skip("setuptools is not installed")
    folder = tmp_path_factory.mktemp("tree")
    for name in PACKED:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            shutil.copy(path, folder / name)
    return folder


def package(tree: Path, folder: Path, hook: str = "build_wheel", hidden: tuple[str, ...] = (), **variables: str):
    """Run a hook of the build backend in a process of its own: the finished process."""
    code = HOOK.format(hidden=hidden, hook=hook, folder=str(folder))
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CUDA_HOME")}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=tree, env=environment | variables, capture_output=True, text=True
    )


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def sources() -> set[str]:
    return {f"memflow_kernels/csrc/{path.name}" for path in (ROOT / "csrc").iterdir()}


def test_a_wheel_of_python_files_needs_no_torch(tree, tmp_path):
    done = package(tree, tmp_path, hidden=("torch", "numpy", "einops"), CUDA_HOME=str(tmp_path / "none"))
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert sources() | {"memflow/py.typed", "memflow_kernels/py.typed"} <= names_in(wheel)
    assert not [name for name in names_in(wheel) if name.endswith((".so", ".o"))]
    assert {name.split("/")[0].split("-")[0] for name in names_in(wheel)} == {"memflow", "memflow_kernels"}


def test_what_is_installed_from_it_finds_its_sources(tree, tmp_path):
    """The kernels can be built at first use from an installed package: there the sources are inside it."""
    done = package(tree, tmp_path)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = "import sys; sys.path.insert(0, sys.argv[1]); from builder import source_folder; print(source_folder())"
    command = [sys.executable, "-c", code, str(tmp_path / "site" / "memflow_kernels" / "cuda")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert Path(said.strip()) == tmp_path / "site" / "memflow_kernels" / "csrc"


def test_the_source_distribution_has_all_that_a_build_needs(tree, tmp_path):
    (tree / "tests").mkdir()
    (tree / "tests" / "test_stray.py").touch()  # setuptools takes such files unless told not to
    done = package(tree, tmp_path, hook="build_sdist")
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir()} <= names
    assert {"setup.py", "pyproject.toml", "memflow_kernels/cuda/builder/toolchain.py"} <= names
    assert {"examples/from_flash_attention.py", "examples/stories/three-friends.txt"} <= names
    assert not [name for name in names if name.startswith("tests") or name.endswith(".pyc")]


def test_with_the_switch_the_wheel_holds_the_library(tree, tmp_path):
    """One file for every Python from 3.10, and for the architectures that were named. The compiler here is a fake."""
    fake_nvcc(tmp_path / "home" / "bin" / "nvcc")
    variables = {"CUDA_HOME": str(tmp_path / "home"), "MEMFLOW_CUDA_ARCHS": "8.0;9.0a"}
    done = package(tree, tmp_path, MEMFLOW_BUILD_CUDA="1", hidden=("numpy", "einops"), **variables)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert "-cp310-abi3-linux_" in wheel.name
    assert "memflow_kernels/cuda/memflow_cuda.abi3.so" in names_in(wheel)
    assert sources() <= names_in(wheel)
    assert "memflow: building the CUDA kernels with nvcc 13.0.88 for 8.0;9.0a" in done.stderr


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"MEMFLOW_BUILD_CUDA": "yes"}, "MEMFLOW_BUILD_CUDA must be 0 or 1, got 'yes'"),
        ({"MEMFLOW_BUILD_CUDA": "1", "MEMFLOW_CUDA_ARCHS": "native"}, "MEMFLOW_CUDA_ARCHS has the entry 'native'"),
        ({"MEMFLOW_BUILD_CUDA": "1"}, "the CUDA kernels were not built: a.cu(1): error: no"),
    ],
    ids=["switch", "architectures", "compiler"],
)
def test_a_build_that_fails_says_why(tree, tmp_path, variables, expected):
    fake_nvcc(tmp_path / "home" / "bin" / "nvcc", "echo 'a.cu(1): error: no'; exit 2")
    done = package(tree, tmp_path, CUDA_HOME=str(tmp_path / "home"), **variables)
    assert done.returncode != 0
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("*.whl"))


def test_without_torch_the_kernels_cannot_be_compiled(tree, tmp_path):
    fake_nvcc(tmp_path / "home" / "bin" / "nvcc")
    variables = {"MEMFLOW_BUILD_CUDA": "1", "CUDA_HOME": str(tmp_path / "home")}
    done = package(tree, tmp_path, hidden=("torch",), **variables)
    assert done.returncode != 0
    assert "torch is not installed: its headers are needed" in done.stderr

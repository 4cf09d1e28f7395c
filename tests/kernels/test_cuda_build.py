"""The build of the CUDA kernels around the compiler: finding it, the key of the cache, failures."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_nvcc import BUILD_CODE, fake_nvcc, sources

from memflow_kernels.cuda import builder
from memflow_kernels.cuda.builder import (
    BuildError,
    Recipe,
    cache_folder,
    cached_library,
    compile_library,
    find_toolchain,
    first_error,
    library_of,
    source_folder,
)
from memflow_kernels.cuda.builder.toolchain import (
    architectures,
    find_ninja,
    find_nvcc,
    nvcc_version,
)

VARIABLES = ("CUDA_HOME", "MEMFLOW_CUDA_ARCHS", "MEMFLOW_CUDA_CACHE", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(builder.toolchain, "USUAL_HOME", tmp_path / "usual")
    monkeypatch.setenv("MEMFLOW_CUDA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Called with a fake compiler's action and version: the recipe of three small files."""
    csrc = sources(tmp_path / "csrc")

    def make(action: str = "", **options: str) -> Recipe:
        monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
        fake_nvcc(tmp_path / "home" / "bin" / "nvcc", action, **options)
        toolchain = find_toolchain()
        return Recipe(csrc, toolchain, architectures(toolchain.known, str(toolchain)), tmp_path / "torch")

    return make


def test_nvcc_is_looked_for_in_four_places(tmp_path, monkeypatch):
    """CUDA_HOME before the PATH before the pip package before /usr/local/cuda."""
    packaged = tmp_path / "site" / "nvidia"
    packaged.mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(packaged.parent)])  # without the packages of this machine
    for name in [name for name in sys.modules if name.split(".")[0] == "nvidia"]:
        monkeypatch.delitem(sys.modules, name)
    places = [tmp_path / "usual" / "bin", packaged / "cu13" / "bin", tmp_path / "path", tmp_path / "home" / "bin"]
    monkeypatch.setenv("PATH", str(places[2]))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    with pytest.raises(BuildError) as caught:
        find_nvcc()
    looked = f"CUDA_HOME ({tmp_path / 'home'}), on the PATH, for the pip package nvidia-cuda-nvcc, and in "
    assert str(caught.value) == f"no nvcc: looked in {looked}{tmp_path / 'usual'}"
    for place in places:
        nvcc = fake_nvcc(place / "nvcc")
        assert find_nvcc() == str(nvcc)
    (places[3] / "nvcc").chmod(0o644)  # not a program
    assert find_nvcc() == str(places[2] / "nvcc")


def test_ninja_is_found_on_the_path_or_as_a_package(tmp_path, monkeypatch):
    pytest.importorskip("ninja", reason="the package ninja is not installed")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert os.access(find_ninja(), os.X_OK)
    monkeypatch.setitem(sys.modules, "ninja", None)
    with pytest.raises(BuildError, match=r"no ninja: .*pip install ninja"):
        find_ninja()
    fake_nvcc(tmp_path / "ninja")
    assert find_ninja() == str(tmp_path / "ninja")


def test_a_compiler_that_does_not_run_says_why(tmp_path):
    nvcc = tmp_path / "nvcc"
    with pytest.raises(BuildError, match=r"does not run: .*No such file"):
        nvcc_version(str(nvcc))
    nvcc.write_text("#!/bin/sh\necho 'libfoo.so: not found' >&2\nexit 3\n")
    nvcc.chmod(0o755)
    with pytest.raises(BuildError, match=r"nvcc --version failed: libfoo.so: not found"):
        nvcc_version(str(nvcc))
    nvcc.write_text("#!/bin/sh\necho something else\n")
    with pytest.raises(BuildError, match="does not name a version"):
        nvcc_version(str(nvcc))


def test_the_key_changes_with_what_decides_about_the_result(recipe, monkeypatch):
    first = recipe()
    assert recipe().key == first.key
    keys = {first.key, recipe(version="13.0.89").key}
    keys.add(recipe(known="80 90").key)
    monkeypatch.setenv("MEMFLOW_CUDA_ARCHS", "8.0")
    keys.add(recipe().key)
    monkeypatch.delenv("MEMFLOW_CUDA_ARCHS")
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-lineinfo")
    keys.add(recipe().key)
    monkeypatch.delenv("NVCC_APPEND_FLAGS")
    monkeypatch.setattr(builder, "COMPILE_FLAGS", (*builder.COMPILE_FLAGS, "-O1"))
    keys.add(recipe().key)
    monkeypatch.undo()
    (first.sources / "launch.h").write_text("// another header\n")
    keys.add(first.key)
    (first.sources / "more.cu").write_text("")
    keys.add(first.key)
    assert len(keys) == 8


def test_the_key_does_not_change_with_anything_else(recipe, monkeypatch, tmp_path):
    first = recipe()
    key = first.key
    (first.sources / "notes.txt").write_text("read me")
    os.utime(first.sources / "means.cu", (0, 0))
    assert first._replace(torch=Path("/elsewhere/torch")).key == key
    moved = first.sources.rename(tmp_path / "moved")
    monkeypatch.setenv("MAX_JOBS", "7")
    assert first._replace(sources=moved).key == key


def test_the_sources_are_there_and_complete():
    names = {path.name for path in source_folder().iterdir()}
    assert {"bindings.cpp", "bindings.h", "launch.h"} <= names


def test_a_library_is_built_once(recipe, tmp_path, capfd):
    calls = tmp_path / "calls"
    made = cached_library(recipe(f'echo "$all" >> {calls}'))
    assert made == library_of(recipe()) and made.is_relative_to(cache_folder())
    said = capfd.readouterr()
    title = "memflow: building the CUDA kernels with nvcc 13.0.88 for 8.0;8.6;8.9;9.0a;10.0a;12.0a\n"
    assert said.err == title
    assert said.out == ""
    assert len(calls.read_text().splitlines()) == 4  # three files and the library
    assert sorted(path.name for path in made.parent.iterdir()) == ["lock", "memflow_cuda.so", "memflow_cuda.so.sha256"]
    assert cached_library(recipe(f'echo "$all" >> {calls}')) == made
    assert len(calls.read_text().splitlines()) == 4
    assert capfd.readouterr().err == ""


def test_what_the_compiler_is_told(recipe, tmp_path):
    text = recipe().ninja_file(tmp_path / "memflow_cuda.so")
    commands = [line for line in text.splitlines() if "-c $in" in line]
    device, host = (next(line for line in commands if flag in line) for flag in ("sm_80", "-isystem"))
    assert "code=sm_90a" in device and "torch" not in device.replace(str(tmp_path), "")  # kernels know nothing of torch
    assert f"-isystem {tmp_path}/torch/include" in host and "sm_" not in host
    assert (
        f"-L{tmp_path}/torch/lib -L{tmp_path}/home/lib -ltorch_cpu" in text
    )  # the pip package has its libraries there
    assert "-cudart=static" in text and "-ltorch_cpu" in text and "-ltorch_cuda" not in text and "python" not in text


def test_progress_in_a_terminal(recipe, tmp_path):
    """A line that counts the steps, in a pseudo-terminal; ninja's own output is not shown."""
    import pty

    csrc = recipe().sources
    ours, theirs = pty.openpty()
    subprocess.run([sys.executable, "-c", BUILD_CODE, str(csrc)], stderr=theirs, check=True)
    os.close(theirs)
    said = os.read(ours, 10_000).decode()
    os.close(ours)
    lines = said.strip().split("\r")
    assert lines[0] == "memflow: building the CUDA kernels with nvcc 13.0.88 for 8.0"
    steps = [f"memflow: building the CUDA kernels [{step}/4] with nvcc 13.0.88 for 8.0" for step in range(1, 5)]
    assert lines[1:] == steps and said.endswith("\r\n")


FAILURES = {  # what the compiler says -> what is shown of it
    "nvcc": ("means.cu(12): error: foo is undefined\\n1 error detected", "means.cu(12): error: foo is undefined"),
    "host": (
        "In file included from a.cpp\\na.cpp:3:10: fatal error: torch/x.h: no such file",
        "a.cpp:3:10: fatal error:",
    ),
    "driver": ("nvcc fatal   : Unsupported gpu architecture", "nvcc fatal   : Unsupported gpu architecture"),
    "ptxas": (
        "ptxas info    : 2 bytes\\nptxas error   : Entry function uses too much",
        "ptxas error   : Entry function",
    ),
    "linker": ("/usr/bin/ld: cannot find -ltorch_cpu", "cannot find -ltorch_cpu"),
    "silent": ("", "ninja: build stopped: subcommand failed."),
}


@pytest.mark.parametrize(("said", "shown"), FAILURES.values(), ids=FAILURES)
def test_a_failure_says_the_compilers_first_error(recipe, said, shown):
    made = recipe(f"printf '{said}\\n' >&2; exit 2")
    with pytest.raises(BuildError) as caught:
        cached_library(made)
    log = library_of(made).parent / "build.log"
    assert shown in str(caught.value) and str(caught.value).endswith(f"(all of it: {log})")
    assert log.is_file()
    assert not library_of(made).exists()
    assert not list(log.parent.glob("building-*"))
    assert cached_library(recipe()).is_file()  # the next try builds again


def test_a_compiler_that_makes_nothing_is_a_failure(recipe, tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(BuildError):
        compile_library(recipe('case "$out" in *.so) exit 0 ;; esac'), tmp_path / "folder", "memflow_cuda.so")


def test_ninja_that_does_not_run(recipe, tmp_path):
    made = recipe()
    broken = made._replace(toolchain=made.toolchain._replace(ninja=str(tmp_path / "ninja")))
    with pytest.raises(BuildError, match=f"{tmp_path}/ninja does not run"):
        cached_library(broken)


def test_a_cache_that_cannot_be_written(recipe, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MEMFLOW_CUDA_CACHE", str(tmp_path / "file"))
    with pytest.raises(BuildError, match=r"the cache folder .*file/.* cannot be used"):
        cached_library(recipe())


def test_the_users_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("MEMFLOW_CUDA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "memflow" / "cuda"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "memflow" / "cuda"
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    with pytest.raises(BuildError, match=r"no place for a cache \(no home\); MEMFLOW_CUDA_CACHE can name one"):
        cache_folder()


def test_first_error_of_no_output():
    assert first_error([]) == "it said nothing"
    assert first_error(["0 errors\n", "warning: error handling is off\n", "done\n"]) == "done"

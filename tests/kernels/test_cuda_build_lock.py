"""Two processes want the CUDA kernels at once; one of them is killed while it builds."""

import os
import signal
import subprocess
import sys
import time

import pytest
from fake_nvcc import BUILD_CODE, fake_nvcc, sources

SECONDS = 60  # far more than any of this takes; a lock that is never released fails the test


@pytest.fixture
def builders(tmp_path, monkeypatch):
    """Called with what the compiler does: starts a process that builds."""
    csrc = sources(tmp_path / "csrc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MEMFLOW_CUDA_CACHE", str(tmp_path / "cache"))
    processes = []

    def start(action: str) -> subprocess.Popen:
        fake_nvcc(tmp_path / "home" / "bin" / "nvcc", action)
        process = subprocess.Popen(
            [sys.executable, "-c", BUILD_CODE, str(csrc)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_for(condition) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_two_processes_build_once(builders, tmp_path):
    """The second waits, says so, and takes what the first has made."""
    calls, go = tmp_path / "calls", tmp_path / "go"
    action = f"echo x >> {calls}; while [ ! -e {go} ]; do sleep 0.02; done"
    first = builders(action)
    wait_for(calls.exists)
    second = builders(action)
    assert "another process is building the CUDA kernels" in second.stderr.readline()
    assert second.poll() is None
    go.touch()
    results = [process.communicate(timeout=SECONDS)[0] for process in (first, second)]
    assert first.returncode == second.returncode == 0
    assert results[0] == results[1] and results[0].strip().endswith("memflow_cuda.so")
    assert len(calls.read_text().split()) == 4  # three files and the library, once


@pytest.mark.parametrize("whole_group", [True, False], ids=["with its compilers", "alone"])
def test_a_killed_builder_blocks_nobody(builders, tmp_path, whole_group):
    """The lock ends with its process, and what that left behind is neither used nor kept."""
    calls = tmp_path / "calls"
    first = builders(f'echo x >> {calls}; echo broken > "$out"; sleep 3; exit 1')
    wait_for(calls.exists)
    (os.killpg if whole_group else os.kill)(first.pid, signal.SIGKILL)
    first.wait(SECONDS)
    second = builders("")
    library = second.communicate(timeout=SECONDS)[0].strip()
    assert second.returncode == 0
    with open(library) as file:
        assert "-shared" in file.read()
    folder = os.path.dirname(library)
    assert sorted(os.listdir(folder)) == ["lock", "memflow_cuda.so", "memflow_cuda.so.sha256"]


def test_a_library_is_there_as_a_whole_or_not_at_all(builders, tmp_path):
    """While the link runs, half a library exists, but not where anybody looks."""
    started, go = tmp_path / "started", tmp_path / "go"
    link = f'case "$out" in *.so) echo half > "$out"; touch {started}; while [ ! -e {go} ]; do sleep 0.02; done ;; esac'
    process = builders(link)
    wait_for(started.exists)
    found = [path.parent.name for path in (tmp_path / "cache").rglob("memflow_cuda.so")]
    assert len(found) == 1 and found[0].startswith("building-")
    go.touch()
    library = process.communicate(timeout=SECONDS)[0].strip()
    with open(library) as file:
        assert "half" not in file.read()

"""Every thread of a CPU measurement has a core of its own."""

import os
import subprocess
import sys

import pytest

THREADS = """
import os, sys
sys.argv = ["benchmarks", "cases"]
try:
    import benchmarks.__main__
except SystemExit:
    pass
import torch
torch.randn(900, 900) @ torch.randn(900, 900)
print()
for task in os.listdir("/proc/self/task"):
    print("core", sorted(os.sched_getaffinity(int(task))))
"""


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system tells no thread's cores")
def test_no_two_threads_share_a_core():
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core only")
    free = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    run = subprocess.run([sys.executable, "-c", THREADS], env=free, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    pinned = [line for line in run.stdout.splitlines() if line.startswith("core") and "," not in line]
    assert len(pinned) >= 2
    assert len(set(pinned)) == len(pinned)

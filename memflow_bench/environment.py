"""Where numbers were measured."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

from .load import other_work

ROOT = Path(__file__).parent.parent
GPU_FIELDS = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "temperature.gpu")


def record(device: torch.device) -> dict[str, object]:
    """Facts of the machine, the software and the moment; None where something cannot be told."""
    facts: dict[str, object] = {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": f"{program()} {shlex.join(sys.argv[1:])}".strip(),
        "commit": commit(),
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),  # pinned, the main thread itself may use one only
        "threads": torch.get_num_threads(),
        "threads_pinned": os.environ.get("OMP_PROC_BIND"),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "other_work": other_work(),
        "load_average": load_average(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        "triton": _version("triton"),
        "memflow_kernels": _version("memflow-kernels"),
    }
    return facts | (_gpu(device) if device.type == "cuda" else {"gpu": None})


def load_average() -> list[float] | None:
    return [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None


def program() -> str:
    """How this was started: the command, or python -m and the package."""
    started = Path(sys.argv[0])
    return f"python -m {started.parent.name}" if started.name == "__main__.py" else started.name


def commit() -> str | None:
    """Short commit; "+" where tracked files differ from it."""
    revision = _output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")
    if revision is None:
        return None
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return revision + ("+" if changed else "")


def _gpu(device: torch.device) -> dict[str, object]:
    properties = torch.cuda.get_device_properties(device)
    fields = _output("nvidia-smi", "--query-gpu=" + ",".join(GPU_FIELDS), "--format=csv,noheader")
    values = fields.splitlines()[0].split(", ") if fields else [None] * len(GPU_FIELDS)
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        **dict(zip(GPU_FIELDS, values, strict=True)),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()

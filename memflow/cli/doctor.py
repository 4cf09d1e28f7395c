"""`memflow doctor`: what this machine can run, and why not the rest. Gathering and showing are apart."""

from __future__ import annotations

import os
import platform
import shutil
import textwrap
from importlib import import_module, metadata
from typing import Any

_MODEL_PACKAGES = ("diffusers", "transformers", "peft", "safetensors", "av", "matplotlib")


def collect() -> dict[str, Any]:
    """Facts about this machine, with plain values (strings, numbers, lists, dicts; None = absent). Nothing here fails.

    Keys: python, platform, cpu, memflow_kernels, torch, gpus, nvcc (version and path), cuda_kernels (where the compiled
    library is, or how it would be built, or why it cannot be), triton, backends (name to None or the reason why it
    cannot run), packages (name to version), libx264 (None or the reason).
    """
    return {
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "cpu": _cpu(),
        "memflow_kernels": _version("memflow-kernels"),
        "torch": _torch(),
        "gpus": _gpus(),
        "nvcc": _nvcc(),
        "cuda_kernels": _cuda_kernels(),
        "triton": _version("triton"),
        "backends": _backends(),
        "packages": {name: _version(name) for name in _MODEL_PACKAGES},
        "libx264": _libx264(),
    }


def show(facts: dict[str, Any]) -> None:
    """Print what `collect` found, with nothing but Python: the base install has no rich."""
    names = max(len(name) for _, rows in _rows(facts) for name, _, _ in rows)
    indent = " " * (9 + 5 + names + 2)
    width = max(60, shutil.get_terminal_size().columns)
    for section, rows in _rows(facts):
        for number, (name, good, text) in enumerate(rows):
            head = f"{section if number == 0 else '':<9}{'yes' if good else 'no':<5}{name:<{names}}  "
            print(textwrap.fill(text, width, initial_indent=head, subsequent_indent=indent, break_on_hyphens=False))
        print()


def _rows(facts: dict[str, Any]) -> list[tuple[str, list[tuple[str, bool, str]]]]:
    """(section, [(name, whether it is there, more about it)])."""
    cpu, torch = facts["cpu"], facts["torch"]
    machine = [
        ("python", True, f"{facts['python']}, {facts['platform']}"),
        ("cpu", True, f"{cpu['cores']} cores" + (f", {cpu['threads']} threads in torch" if cpu["threads"] else "")),
    ]
    if isinstance(torch, dict):
        cuda = f", CUDA {torch['cuda']}" if torch["cuda"] else ", built without CUDA"
        machine.append(("torch", True, torch["version"] + cuda))
    else:
        machine.append(("torch", False, torch))
    for gpu in facts["gpus"]:
        machine.append((gpu["name"], True, f"compute capability {gpu['capability']}, {gpu['memory_gib']} GiB"))
    if not facts["gpus"]:
        machine.append(("GPU", False, "none that torch can use: all runs on the CPU"))
    kernels = [
        (f"{name} backend", reason is None, reason or "works here") for name, reason in facts["backends"].items()
    ]
    kernels.append(("memflow-kernels", True, facts["memflow_kernels"] or "not installed as a package"))
    kernels.append(("triton package", facts["triton"] is not None, facts["triton"] or "not installed"))
    kernels.append(
        ("nvcc", facts["nvcc"] is not None, facts["nvcc"] or "not found; only building CUDA kernels needs it")
    )
    kernels.append(("CUDA kernels", facts["cuda_kernels"].startswith("built"), facts["cuda_kernels"]))
    install = "not installed: pip install 'memflow-kernels[model]'"
    stories = [(name, version is not None, version or install) for name, version in facts["packages"].items()]
    stories.append(("libx264", facts["libx264"] is None, facts["libx264"] or "video can be written"))
    return [("machine", machine), ("kernels", kernels), ("stories", stories)]


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _torch() -> dict[str, str | None] | str:
    try:
        torch = import_module("torch")
        return {"version": torch.__version__, "cuda": torch.version.cuda or torch.version.hip}
    except Exception as error:  # a broken installation fails in many ways, and all of them are to be shown
        return _reason(error)


def _cpu() -> dict[str, int | None]:
    try:
        threads = import_module("torch").get_num_threads()
    except Exception:  # said under "torch"
        threads = None
    affinity = getattr(os, "sched_getaffinity", None)
    return {"cores": len(affinity(0)) if affinity else os.cpu_count(), "threads": threads}


def _gpus() -> list[dict[str, Any]]:
    try:
        cuda = import_module("torch").cuda
        found = [cuda.get_device_properties(index) for index in range(cuda.device_count())]
    except Exception:  # no driver, a broken driver, no torch: no GPU that can be used
        return []
    return [
        {"name": gpu.name, "capability": f"{gpu.major}.{gpu.minor}", "memory_gib": round(gpu.total_memory / 2**30)}
        for gpu in found
    ]


def _backends() -> dict[str, str | None]:
    try:
        return import_module("memflow_kernels.backends").available_backends()
    except Exception as error:  # as for torch
        return {"every": _reason(error)}


def _nvcc() -> str | None:
    try:
        toolchain = import_module("memflow_kernels.cuda.builder.toolchain")
        path = toolchain.find_nvcc()
        return f"{toolchain.nvcc_version(path)}, {path}"
    except Exception:  # not there, or broken: what stands under "CUDA kernels" says more
        return None


def _cuda_kernels() -> str:
    try:
        return import_module("memflow_kernels.cuda.extension").described()
    except Exception as error:  # as for torch
        return _reason(error)


def _libx264() -> str | None:
    try:
        return (
            None if "libx264" in import_module("av").codecs_available else "this build of PyAV has no libx264 encoder"
        )
    except Exception as error:  # as for torch
        return _reason(error)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".rstrip(": ")

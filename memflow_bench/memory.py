"""Peak memory of a call, beyond what was held before it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch


def peak_bytes(run: Callable[[], object], device: torch.device) -> tuple[object, int | None]:
    """(what `run` returned, bytes): of the GPU's allocator, or of the process as Linux counts it; None elsewhere."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        returned = run()
        torch.cuda.synchronize(device)
        return returned, torch.cuda.max_memory_allocated(device) - before
    _give_back_what_is_free()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = _status("VmRSS")
    except OSError:
        return run(), None
    returned = run()
    return returned, max(_status("VmHWM") - before, 0)


def _give_back_what_is_free() -> None:
    """To the kernel, by glibc: a call that used it again would seem to need less than it does."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")

"""What a provider is."""

from __future__ import annotations

import importlib.util

import torch


class Provider:
    """One implementation to compare. To add one: a class with a `name`, `missing` and a method per workload it can do.

    The method is named like the workload (`attention`, `means`, `write`, `update`, `layer`, `chunk`), takes its state
    and returns the callable that is timed, which returns the result that is checked. What a real program would do once,
    outside its loop, belongs before the callable.
    """

    name: str

    def missing(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """None where it can run; otherwise the reason why not, for the report."""
        return None

    def prepare(self, workload: str, state: object):
        """The callable for `workload`, or None where this provider does not do it."""
        method = getattr(self, workload, None)
        return None if method is None else method(state)


def needs_gpu(device: torch.device) -> str | None:
    return None if device.type == "cuda" else "runs on a GPU only"


def needs_half(dtype: torch.dtype) -> str | None:
    return None if dtype in (torch.bfloat16, torch.float16) else "bfloat16 and float16 only"


def not_installed(module: str) -> str | None:
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # of the parent package
        found = None
    return None if found else f"the module {module} is not installed"

"""Which backends exist here, and which one runs an op.

A backend is a package that holds one callable per op, named like the op and taking the op's arguments in its order.
`torch` (memflow_kernels.reference) runs everywhere and is the specification of the others.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch


class Backend(NamedTuple):
    """One way to run the ops."""

    package: str
    missing: Callable[[], str | None]  # None: it can run here; otherwise the reason why not


BACKENDS: dict[str, Backend] = {
    "torch": Backend("memflow_kernels.reference", lambda: None),
    "triton": Backend("memflow_kernels.triton", lambda: "this version of memflow_kernels has no Triton kernels"),
    "cuda": Backend("memflow_kernels.cuda", lambda: "this version of memflow_kernels has no compiled CUDA kernels"),
}

# Process-wide rather than per thread: autograd runs the backward of a GPU op in a thread of its own.
_forced: list[str] = []


def available_backends() -> dict[str, str | None]:
    """Every backend by name: None where it can run on this machine, otherwise the reason why it cannot."""
    return {name: backend.missing() for name, backend in BACKENDS.items()}


def _require(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} names the backend {name!r}; known backends: {', '.join(BACKENDS)}")
    reason = BACKENDS[name].missing()
    if reason is not None:
        raise RuntimeError(f"{source} asks for the backend {name!r}, which cannot run here: {reason}")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op inside the `with` block on one backend; the choice holds for the whole process.

    Raises ValueError for an unknown name and RuntimeError, with the reason, for a backend that cannot run here.
    """
    _forced.append(_require(name, "use_backend"))
    try:
        yield
    finally:
        _forced.pop()


def current_backend(device: torch.device) -> str:
    """The backend that runs an op on `device`: use_backend, else MEMFLOW_BACKEND, else the device's default."""
    if _forced:
        return _forced[-1]
    wished = os.environ.get("MEMFLOW_BACKEND")
    if wished:
        return _require(wished, "MEMFLOW_BACKEND")
    return "torch"


@functools.cache
def implementation(op_name: str, backend: str) -> Callable:
    """The callable that runs op `op_name` on `backend`.

    Raises ValueError for an unknown backend, RuntimeError for one that cannot run here or has no such op.
    """
    package = importlib.import_module(BACKENDS[_require(backend, "implementation")].package)
    function = getattr(package, op_name, None)
    if function is None:
        raise RuntimeError(f"the backend {backend!r} has no op {op_name!r}")
    return function


def dispatch(op_name: str, device: torch.device) -> Callable:
    """The callable that runs op `op_name` for tensors on `device`."""
    return implementation(op_name, current_backend(device))

"""Which backends exist here, and which one runs an op.

A backend is a package that holds one callable per op, named like the op and taking the op's arguments in its order.
`torch` (memflow_kernels.reference) runs everywhere and is the specification of the others. `triton`
(memflow_kernels.triton) is the default on a GPU; it runs on the CPU only through Triton's interpreter, for tests.
`cuda` (memflow_kernels.cuda) has compiled kernels, and hands on what they do not serve.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import NamedTuple, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


class Backend(NamedTuple):
    """One way to run the ops."""

    package: str
    missing: Callable[[], str | None]  # None: it can run here; otherwise the reason why not


def interpreting() -> bool:
    """Triton runs its kernels on the CPU, one program after the other. It reads the variable when it is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


NO_GPU = "torch sees no GPU here"


@functools.cache
def _gpu_missing() -> str | None:
    if not torch.cuda.is_available():
        return NO_GPU
    if torch.version.cuda and torch.cuda.get_device_capability() < (8, 0):
        return f"{torch.cuda.get_device_name()} is too old: compute capability 8.0 (Ampere) is needed"
    return None


def _triton_missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed: a torch for GPUs brings its own (or, on Linux, pip install triton)"
    reason = None if interpreting() else _gpu_missing()
    return (
        f"{NO_GPU} (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly, for tests)" if reason == NO_GPU else reason
    )


def _cuda_missing() -> str | None:
    if torch.version.hip:
        return "the compiled kernels are for NVIDIA GPUs"
    return _gpu_missing() or importlib.import_module(f"{__package__}.cuda.extension").missing()


BACKENDS: dict[str, Backend] = {
    "torch": Backend(f"{__package__}.reference", lambda: None),
    "triton": Backend(f"{__package__}.triton", _triton_missing),
    "cuda": Backend(f"{__package__}.cuda", _cuda_missing),
}

# Where the compiled kernels are the default: (op, GPU such as "sm_90"). An entry needs a committed measurement in
# benchmarks/results/<gpu>.json in which they are faster than Triton's. There is none yet.
COMPILED_IS_FASTER: frozenset[tuple[str, str]] = frozenset()

# Process-wide rather than per thread: autograd runs the backward of a GPU op in a thread of its own.
_forced: str | None = None


def available_backends() -> dict[str, str | None]:
    """Every backend by name: None where it can run on this machine, otherwise the reason why it cannot.

    Example:
        >>> from memflow_kernels import available_backends
        >>> available_backends()["torch"] is None
        True
    """
    return {name: backend.missing() for name, backend in BACKENDS.items()}


def _require(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} names the backend {name!r}; known backends: {', '.join(BACKENDS)}")
    reason = BACKENDS[name].missing()
    if reason is not None:
        raise RuntimeError(f"{source} asks for the backend {name!r}, which cannot run here: {reason}")
    return name


class use_backend:
    """Run every op on one backend, in the whole process: from here on, or inside a `with` block.

    As a statement of its own it holds until the next use_backend; a `with` block, or a function that it decorates, ends
    with the choice that was in force before. It goes before MEMFLOW_BACKEND.

    Args:
        name: "torch", "triton" or "cuda", see available_backends.

    Raises:
        ValueError: for an unknown name.
        RuntimeError: for a backend that cannot run here, with the reason.

    Example:
        >>> import torch
        >>> from memflow_kernels import frame_means, use_backend
        >>> with use_backend("torch"):
        ...     frame_means(torch.ones(1, 6, 2, 16), 3).shape
        torch.Size([1, 2, 2, 16])
    """

    def __init__(self, name: str) -> None:
        global _forced
        self.name, self._before = _require(name, "use_backend"), _forced
        _forced = self.name

    def __enter__(self) -> None:
        global _forced
        _forced = self.name

    def __exit__(self, *error: object) -> None:
        global _forced
        _forced = self._before

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        self.__exit__()  # decorating chooses nothing yet

        @functools.wraps(function)
        def run(*arguments: P.args, **options: P.kwargs) -> R:
            with use_backend(self.name):
                return function(*arguments, **options)

        return run


def uncompiled() -> str:
    """The default on a GPU where nothing compiled runs: `triton` where it can run, otherwise `torch`."""
    return "triton" if _triton_missing() is None else "torch"


@functools.cache
def _compiled_is_faster(op_name: str, index: int) -> bool:
    major, minor = torch.cuda.get_device_capability(index)
    return (op_name, f"sm_{major}{minor}") in COMPILED_IS_FASTER and _cuda_missing() is None


def current_backend(device: torch.device, op_name: str | None = None) -> str:
    """The backend that runs op `op_name` on `device`: use_backend, else MEMFLOW_BACKEND, else the default.

    The default on a GPU is `triton` where it can run, but `cuda` for the ops that COMPILED_IS_FASTER names; everywhere
    else it is `torch`.
    """
    if _forced is not None:
        return _forced
    wished = os.environ.get("MEMFLOW_BACKEND")
    if wished:
        return _require(wished, "MEMFLOW_BACKEND")
    if device.type != "cuda":
        return "torch"
    return "cuda" if COMPILED_IS_FASTER and _compiled_is_faster(op_name, device.index or 0) else uncompiled()


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


def refused(backend: str, device: torch.device) -> str | None:
    """Why a backend that can run here does not take tensors on `device`; None where it does."""
    if backend == "triton" and device.type == "cpu" and not interpreting():
        return "the backend 'triton' runs on a GPU, not on the CPU (but for tests, slowly, with TRITON_INTERPRET=1)"
    if backend == "cuda" and device.type == "cpu":
        return "the backend 'cuda' runs on a GPU, not on the CPU"
    return None


def _is_current(device: torch.device) -> bool:
    """Whether a kernel launched now runs on `device`: Triton asks for the current device, not for its arguments'."""
    return device.index is None or device.type != "cuda" or device.index == torch.cuda.current_device()


def _on(device: torch.device, run: Callable) -> Callable:
    def guarded(*arguments):
        with torch.cuda.device(device):
            return run(*arguments)

    return guarded


def dispatch(op_name: str, device: torch.device) -> Callable:
    """The callable that runs op `op_name` for tensors on `device`.

    Raises RuntimeError where the backend that was asked for does not run on this kind of device.
    """
    backend = current_backend(device, op_name)
    reason = refused(backend, device)
    if reason is not None:
        raise RuntimeError(f"{op_name}: {reason}")
    run = implementation(op_name, backend)
    return run if _is_current(device) else _on(device, run)

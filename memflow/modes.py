"""Torch's modes while the library computes: its own, not the caller's."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def own_modes() -> Iterator[None]:
    """Inside there are no gradients, no inference mode and no autocast, and the defaults are float32 and the CPU.

    So what a stream makes is the same whatever its caller has set, and tensors that it keeps are ordinary ones.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(_DEFAULT_DTYPE)
        yield


class _Float32ByDefault:
    """Torch has one default dtype for all threads: the first to come sets float32, the last to go gives back what was
    there. While any thread is inside, all of the process have it."""

    def __init__(self):
        self.lock, self.inside, self.callers = threading.Lock(), 0, torch.float32

    def __enter__(self) -> None:
        with self.lock:
            self.inside += 1
            if self.inside == 1:
                self.callers = torch.get_default_dtype()
            torch.set_default_dtype(torch.float32)

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside and self.callers != torch.float32:
                torch.set_default_dtype(self.callers)


_DEFAULT_DTYPE = _Float32ByDefault()

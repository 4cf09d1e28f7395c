"""Where the time of a transformer goes: linear layers, attention, memory, the rest."""

from __future__ import annotations

import time
from collections import defaultdict
from contextlib import contextmanager

import torch
from diffusers.models.transformers.transformer_wan import WanAttention
from torch import nn


class Split:
    """Exclusive time by name: what begins inside another part is taken out of it.

    On a GPU every change of part records an event, read when all is done; on a CPU it reads the clock.
    """

    def __init__(self, device: torch.device):
        self.gpu = device.type == "cuda"
        self.stack = ["rest"]
        self.marks: list[tuple[str, object]] = []  # (part that ends here, when)

    def seconds(self) -> dict[str, float]:
        """Time by part between the first mark and the last."""
        if self.gpu:
            torch.cuda.synchronize()
        total: dict[str, float] = defaultdict(float)
        for (_, before), (part, now) in zip(self.marks, self.marks[1:], strict=False):
            total[part] += before.elapsed_time(now) / 1e3 if self.gpu else now - before
        return dict(total)

    def mark(self) -> None:
        now: object = time.perf_counter()
        if self.gpu:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        self.marks.append((self.stack[-1], now))

    @contextmanager
    def part(self, name: str):
        self.mark()
        self.stack.append(name)
        try:
            yield
        finally:
            self.mark()
            self.stack.pop()

    @contextmanager
    def watching(self, transformer: nn.Module):
        """Linears ("linear") and attention without its linears ("attention") of `transformer`, in this block."""
        hooks = []
        for module in transformer.modules():
            name = {WanAttention: "attention", nn.Linear: "linear"}.get(type(module))
            if name is not None:
                hooks.append(module.register_forward_pre_hook(self._enter(name)))
                hooks.append(module.register_forward_hook(self._leave))
        self.mark()
        try:
            yield
        finally:
            self.mark()
            for hook in hooks:
                hook.remove()

    def _enter(self, name: str):
        def enter(module, arguments):
            self.mark()
            self.stack.append(name)

        return enter

    def _leave(self, module, arguments, output) -> None:
        self.mark()
        self.stack.pop()

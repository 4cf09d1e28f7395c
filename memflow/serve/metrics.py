"""What a server counts, and the text in which Prometheus reads it."""

from __future__ import annotations

import time
from collections import Counter, deque

import psutil
import torch

_WINDOW = 10.0  # seconds over which frames per second are counted
_BUCKETS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


class Metrics:
    """Counts of one server.

    Attributes:
        errors: how many connections ended, or messages were refused, by code.
        saved: states written.
    """

    def __init__(self):
        self.errors: Counter[str] = Counter()
        self.saved = 0
        self.chunks = self.frames = 0
        self._seconds, self._below = 0.0, [0] * len(_BUCKETS)
        self._recent: deque[tuple[float, int]] = deque()
        self._process = psutil.Process()

    def made(self, frames: int, seconds: float) -> None:
        """Count a chunk of `frames` video frames that took `seconds`."""
        self.chunks, self.frames, self._seconds = self.chunks + 1, self.frames + frames, self._seconds + seconds
        self._below = [count + (seconds <= most) for count, most in zip(self._below, _BUCKETS, strict=True)]
        self._recent.append((time.monotonic(), frames))
        self._forget()

    def text(self, sessions: int, queue: int, disk: int) -> str:
        """All of it in the text format of Prometheus, version 0.0.4.

        Args:
            sessions: stories that are being told.
            queue: those that wait for a turn.
            disk: bytes of all films and states.
        """
        self._forget()
        rate = sum(frames for _, frames in self._recent) / _WINDOW
        lines: list[str] = []

        def say(name: str, kind: str, about: str, *values: tuple[str, float]) -> None:
            lines.extend([f"# HELP memflow_{name} {about}", f"# TYPE memflow_{name} {kind}"])
            lines.extend(f"memflow_{name}{label} {value}" for label, value in values)

        say("sessions", "gauge", "Stories that are being told.", ("", sessions))
        say("queue", "gauge", "Stories that wait for a turn.", ("", queue))
        say("chunks_total", "counter", "Chunks made.", ("", self.chunks))
        say("frames_total", "counter", "Video frames made.", ("", self.frames))
        say("frames_per_second", "gauge", f"Video frames made, over the last {_WINDOW:g} s.", ("", rate))
        buckets = [(f'_bucket{{le="{most:g}"}}', n) for most, n in zip(_BUCKETS, self._below, strict=True)]
        buckets += [('_bucket{le="+Inf"}', self.chunks), ("_sum", self._seconds), ("_count", self.chunks)]
        say("chunk_seconds", "histogram", "What it took to make a chunk.", *buckets)
        say("saved_total", "counter", "States written.", ("", self.saved))
        errors = [(f'{{code="{code}"}}', n) for code, n in sorted(self.errors.items())]
        say("errors_total", "counter", "Messages refused and connections ended, by code.", *errors)
        memory = [('{where="host"}', self._process.memory_info().rss)]
        memory += [('{where="gpu"}', torch.cuda.memory_allocated())] if torch.cuda.is_available() else []
        say("memory_bytes", "gauge", "Memory in use.", *memory)
        say("disk_bytes", "gauge", "Of all films and states.", ("", disk))
        return "\n".join(lines) + "\n"

    def _forget(self) -> None:
        while self._recent and self._recent[0][0] < time.monotonic() - _WINDOW:
            self._recent.popleft()

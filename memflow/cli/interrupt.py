"""Ctrl-C at a convenient moment."""

from __future__ import annotations

import signal
from collections.abc import Callable


class Interrupt:
    """Within the `with` block the first Ctrl-C only sets `requested`; the second is a KeyboardInterrupt as ever.

    notify: called at the first Ctrl-C.
    """

    def __init__(self, notify: Callable[[], None]):
        self.requested = False
        self._notify = notify

    def __enter__(self) -> Interrupt:
        self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _handle(self, number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self.requested = True
        self._notify()

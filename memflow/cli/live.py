"""`memflow generate --live`: lines that are typed, or piped in, while the film is made; each is the next scene."""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from memflow.errors import MemFlowError

if TYPE_CHECKING:
    from memflow.stream.stream import Stream

_BLINK = 0.2  # seconds between two looks whether Ctrl-C was pressed


class Lines:
    """The lines of stdin as they come, read by a thread of their own.

    One is handed over before each chunk: `Stream.send` would drop all but the last.
    """

    def __init__(self):
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._ended = False
        threading.Thread(target=self._read, daemon=True).start()

    def hand_over(self, stream: Stream, say: Callable[[str], None], stopped: Callable[[], bool]) -> None:
        """Send the next line to `stream`. At the end of what is planned wait for one, until there can be no more.

        Args:
            stream: which chunk comes next.
            say: told what is wrong with a line; the story goes on without it.
            stopped: whether to wait no longer.
        """
        while stream.position and not self._ended and not stopped():  # the story's own beginning comes first
            over = not len(stream.plan)
            try:
                line = self._lines.get(block=over, timeout=_BLINK if over else None)
            except queue.Empty:
                if over:
                    continue
                return
            if line is None:
                self._ended = True
            elif line.strip():
                try:
                    stream.send(line.strip())
                    return
                except MemFlowError as error:
                    say(str(error))

    def _read(self) -> None:
        try:
            for line in sys.stdin:
                self._lines.put(line)
        except (OSError, ValueError) as error:  # no UTF-8, or a terminal that is gone
            print(f"memflow: stdin cannot be read on: {error}", file=sys.stderr)
        self._lines.put(None)

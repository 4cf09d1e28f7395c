"""What the command says in a terminal, and the lines that are typed there meanwhile, each the next scene (`--live`)."""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from memflow.errors import MemFlowError, shown

if TYPE_CHECKING:
    from memflow.stream.stream import Stream

_BLINK = 0.2  # seconds between two looks whether Ctrl-C was pressed
_WAITING, _LINE = 64, 2**20  # lines that are read ahead, and letters of one: stdin may have no end


def say(console: Console, text: str, style: str = "") -> None:
    """One line. Long paths are not wrapped, so that they can be copied."""
    console.print(Text(shown(text), style), soft_wrap=True)


def bars(console: Console) -> Progress:
    """Bars with a field `unit`; drawn in a terminal alone."""
    return Progress(
        TextColumn("{task.description}", style="bold", markup=False),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        TimeRemainingColumn(compact=True),
        console=console,
        disable=not console.is_terminal,
    )


def print_numbers(lines: Iterable[tuple[str, str]]) -> None:
    """(label, text) in two columns, on stdout."""
    console = Console(highlight=False, markup=False)
    for label, text in lines:
        console.print(Text.assemble((f"{label:<8}", "dim"), shown(text)), soft_wrap=True)


class Lines:
    """The lines of stdin as they come, read by a thread of their own.

    One is handed over before each chunk: `Stream.send` would drop all but the last.
    """

    def __init__(self):
        self._lines: queue.Queue[str | None] = queue.Queue(_WAITING)
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
            if hasattr(sys.stdin, "reconfigure"):
                sys.stdin.reconfigure(
                    errors="surrogateescape"
                )  # what is no text is refused with its line, not with all
            first = True
            while line := sys.stdin.readline(_LINE):
                self._lines.put(line.removeprefix("\ufeff") if first else line)
                first = False
                while line and not line.endswith("\n"):  # a longer line is refused as it is; its rest is no other one
                    line = sys.stdin.readline(_LINE)
        except (OSError, ValueError) as error:  # a terminal that is gone
            print(f"memflow: stdin cannot be read on: {error}", file=sys.stderr)
        self._lines.put(None)

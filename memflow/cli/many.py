"""`memflow generate --jobs N` and `--ray`: many stories over workers, each film made once."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from memflow.cli import Interrupt, shown
from memflow.cli.options import Request
from memflow.cli.story import Story, check_settings, read_stories, settings
from memflow.errors import MemFlowError
from memflow.output import check_writable
from memflow.output.video import check_output
from memflow.tellers.pool import Carrier, Event, Processes, tell
from memflow.tellers.records import FOLDER, Task, is_done

_ALONE = ("prompts", "chunks", "save_state", "resume")  # options for one story


def generate_many(request: Request) -> int:
    """Make the films of a file of stories; returns the exit code.

    0: all of them are there. 2: some cannot be made, each said in a line; the others are there. 130: stopped, and what
    goes on from here is the same command.
    """
    _check(request)
    console = Console(stderr=True, highlight=False, markup=False)
    bad: list[str] = []
    stories = read_stories(request.story, bad)
    todo, there = _todo(request, stories, bad) if stories else ([], 0)
    for sentence in bad:
        _say(console, sentence)
    table = _Table(console, todo, there, len(bad))
    start = time.monotonic()
    if todo:
        _run(request, todo, table, console)
    table.summary(request.output, time.monotonic() - start)
    if table.left:
        _say(console, f"stopped: {table.left} films are not done; the same command goes on with them")
        return 130
    return 2 if table.failed else 0


def _check(request: Request) -> None:
    """MemFlowError for what can be seen to be wrong in the options."""
    if request.story is None or request.output is None:
        raise MemFlowError("--jobs and --ray need a file of stories, and -o FOLDER for their films")
    given = [request.written(name) for name in _ALONE if getattr(request, name) not in (None, [])]
    if given:
        raise MemFlowError(f"{', '.join(given)}: for one story, not with --jobs and --ray")
    if request.ray and os.path.exists(request.ray):
        raise MemFlowError(f"--ray {request.ray}: is a file, not the address of a cluster; --ray= has no address")
    check_settings(request)


def _todo(request: Request, stories: list[Story], bad: list[str]) -> tuple[list[Task], int]:
    """The films to make, and how many are done already; what cannot be made is added to `bad`."""
    folder = request.output.absolute()
    try:
        (folder / FOLDER).mkdir(parents=not folder.parent.exists() and False, exist_ok=True)
    except OSError as error:
        raise MemFlowError(f"{request.output}: the folder cannot be made: {error.strerror}") from None
    todo, there = [], 0
    for story in stories:
        task = Task(folder / f"{story.name}.mp4", _told(story, request), request.overwrite)
        try:
            check_output(task.film)
            check_writable(task.record)
            if is_done(task):
                there += 1
            else:
                todo.append(task)
        except MemFlowError as error:
            bad.append(str(error))
    return todo, there


def _told(story: Story, request: Request) -> dict[str, Any]:
    """All that decides what the film shows, as JSON has it."""
    from memflow.cli.loading import lasting

    given = request.saved() | {"model": lasting(request.model or "storybook")}
    given.pop("story")
    plain = {name: str(value.absolute()) if isinstance(value, Path) else value for name, value in given.items()}
    return plain | {"prompts": story.prompts} | settings(story, request)

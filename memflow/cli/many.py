"""`memflow generate --jobs N` and `--ray`: many stories over workers, each film made once."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import TaskID

from memflow.cli import Interrupt
from memflow.cli.checks import check_report, check_settings, made_folders
from memflow.cli.options import Request, lasting, with_whole_paths
from memflow.cli.story import Story, read_stories, settings
from memflow.cli.terminal import bars, print_numbers, say
from memflow.errors import MemFlowError, shown
from memflow.output import check_writable
from memflow.output.video import check_output
from memflow.parallel import launched
from memflow.tellers.pool import Carrier, Event, Processes, Worker, tell
from memflow.tellers.records import FOLDER, Task, is_done

_ALONE = ("prompts", "chunks", "save_state", "resume", "live")  # options for one story


def generate_many(request: Request) -> int:
    """Make the films of a file of stories; returns the exit code.

    0: all of them are there. 2: some cannot be made, each said in a line; the others are there. 130: stopped, and what
    goes on from here is the same command.
    """
    _check(request)
    console = Console(stderr=True, highlight=False, markup=False)
    bad: list[str] = []
    stories = read_stories(request.story, bad)
    with made_folders(request.output, request.output / FOLDER):
        todo, there = _todo(request, stories, bad)
        table = _Table(console, todo, there, len(bad))
        for sentence in bad:
            table.say(sentence)
        start = time.monotonic()
        try:
            if todo:
                _run(request, todo, table)
        except KeyboardInterrupt:
            table.say("stopped at once: stories go on from the last state that was written")
    table.summary(request.output, time.monotonic() - start)
    if table.left:
        table.say(f"stopped: {table.left} films are not done; the same command goes on with them")
        return 130
    return 2 if table.failed else 0


def _check(request: Request) -> None:
    """MemFlowError for what can be seen to be wrong in the options."""
    if request.story is None or request.output is None:
        raise MemFlowError("--jobs and --ray need a file of stories, and -o FOLDER for their films")
    if launched():
        raise MemFlowError("--jobs and --ray start processes of their own: not under torchrun, whose make one story")
    given = [request.written(name) for name in _ALONE if getattr(request, name)]
    if given:
        raise MemFlowError(f"{', '.join(given)}: for one story, not with --jobs and --ray")
    if request.ray and os.path.exists(request.ray):
        raise MemFlowError(f"--ray {request.ray}: is a file, not the address of a cluster; --ray= has no address")
    check_settings(request)


def _todo(request: Request, stories: list[Story], bad: list[str]) -> tuple[list[Task], int]:
    """The films to make, and how many are done already; what cannot be made is added to `bad`."""
    folder, todo, there = request.output.absolute(), [], 0
    for story in stories:
        task = Task(folder / f"{story.name}.mp4", _told(story, request), request.overwrite)
        try:
            check_output(task.film)
            check_writable(task.record)
            if request.report:
                check_report(task.film.with_suffix(".png"), request.overwrite)
            if is_done(task):
                there += 1
            else:
                todo.append(task)
        except MemFlowError as error:
            bad.append(str(error))
    return todo, there


def _told(story: Story, request: Request) -> dict[str, Any]:
    """All that decides what the film shows, as JSON has it."""
    given = request.saved() | {"model": lasting(request.model or "storybook")}
    given.pop("story")
    plain = {name: str(value.absolute()) if isinstance(value, Path) else value for name, value in given.items()}
    return plain | {"prompts": story.prompts} | settings(story, request)


def _run(request: Request, todo: list[Task], table: _Table) -> None:
    """Let workers make the films, up to Ctrl-C."""
    request = replace(with_whole_paths(request), output=request.output.absolute())
    with _carrier(request, len(todo)) as (carrier, count), Interrupt() as interrupt, table:
        interrupt.notify = lambda: table.say("stopping after the chunks in hand; once more stops at once")
        with closing(tell(carrier, count, todo, lambda: interrupt.requested)) as events:
            for event in events:
                table.show(event)


@contextmanager
def _carrier(request: Request, most: int) -> Iterator[tuple[Carrier, int]]:
    """Where workers live, and how many there are."""
    if request.ray is None:
        yield Processes(partial(_worker, request, request.jobs)), min(request.jobs, most)
        return
    from memflow.tellers.actors import Actors, cluster, share

    with cluster(request.ray) as resources:
        takes, fit = share(resources, request.device)
        yield Actors(partial(_worker, request, 0), takes), min(request.jobs or fit, most)


def _worker(request: Request, local: int, index: int) -> Worker:
    """Called where the worker lives: whoever only counts the films needs no torch."""
    return import_module("memflow.cli.worker").FilmWorker(request, local, index)


class _Table:
    """How far the films are: a table in a terminal, elsewhere a line for each that begins or ends."""

    def __init__(self, console: Console, todo: list[Task], there: int, failed: int):
        self._todo, self._there, self.failed = todo, there, failed
        self._rows: dict[int, tuple[TaskID, float]] = {}  # of films in the making, and since when
        self._frames: dict[tuple[int, int], int] = {}  # made, by film and worker
        self._told: set[int] = set()
        self._went_on: set[int] = set()
        self.left = len(todo)  # neither told nor given up
        self._progress = bars(console)
        self._total = self._progress.add_task("all", total=len(todo), unit="films")

    def __enter__(self) -> None:
        self._progress.start()

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """One line, above the table."""
        say(self._progress.console, text)

    def show(self, event: Event) -> None:
        """Show what came of a story."""
        name, worker = self._todo[event.task].name, event.worker + 1
        if event.kind == "step":
            self._step(event.task, worker, name, **event.content)
        elif event.kind == "said":
            self.say(f"{name}: {event.content}")
        else:
            row = self._rows.pop(event.task, None)
            if row is not None:
                self._progress.remove_task(row[0])
            if event.kind == "lost":
                self.say(f"{name}: worker {worker} is gone ({event.content}), the story goes on elsewhere")
            elif event.kind == "failed":
                self.failed += 1
                self.left -= 1
                self.say(f"{name}: {event.content}")
            elif event.task in self._told:
                self.left -= 1
            elif row is None:  # another run has made it meanwhile
                self._there += 1
                self.left -= 1
            self._progress.update(self._total, completed=len(self._todo) - self.left)

    def _step(self, task: int, worker: int, name: str, *, position, length, frames, made, done) -> None:
        if task not in self._rows:
            row = self._progress.add_task(shown(name), total=length, completed=position, unit="chunks")
            self._rows[task] = row, time.monotonic()
            if position:
                self._went_on.add(task)
            self.say(f"{name}: worker {worker} " + (f"goes on after chunk {position}" if position else "begins"))
        row, since = self._rows[task]
        self._frames[task, worker] = made
        unit = f"chunks  {made / max(time.monotonic() - since, 1e-3):.1f} frames/s  worker {worker}"
        self._progress.update(row, completed=position, unit=unit)
        if done:
            self._told.add(task)
            self.say(f"{name}: {frames} frames, {self._todo[task].film}")

    def summary(self, folder: Path, seconds: float) -> None:
        """The numbers, on stdout."""
        made = sum(self._frames.values())
        lines = [
            ("films", str(folder)),
            ("told", f"{len(self._told)}, {len(self._told & self._went_on)} of them on from a saved state"),
        ]
        lines += [("there", f"{self._there} from before")] if self._there else []
        lines += [("failed", str(self.failed))] if self.failed else []
        lines += [("left", str(self.left))] if self.left else []
        lines += [("all", f"{made} frames in {seconds:.1f} s, {made / seconds:.1f} frames/s")] if made else []
        print_numbers(lines)

"""A pool of workers that tell stories, each with a model of its own: processes of this machine, or actors of a Ray
cluster (`memflow.tellers.actors`). A story whose worker dies goes to another one."""

from __future__ import annotations

import multiprocessing
import signal
import threading
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from typing import Any, NamedTuple, Protocol

from memflow.errors import MemFlowError, warned

_LIVES = 3  # workers that a story may take with it, and workers that may die in a row before any is ready


class Worker(Protocol):
    """What a pool wants of a worker; made by `make(index)` where it works."""

    def tell(self, task: Any, stopping: Callable[[], bool]) -> Iterator[dict]:
        """Tell one story, and say how far it is after every step; ends early where `stopping()`."""


class Event(NamedTuple):
    """What came of a story.

    Attributes:
        task: its number.
        worker: number of the worker.
        kind: "step": of the worker's `tell`, as it gave it. "said": a sentence to be shown. "told": it ended.
            "failed": so it did, of the error in `content`, and is not tried again. "lost": its worker died of
            `content`; another one goes on with it.
        content: a dict for "step", else a sentence.
    """

    task: int
    worker: int
    kind: str
    content: Any = ""


class Carrier(Protocol):
    """Where workers live. Its handles are known to itself alone."""

    def start(self, index: int) -> Any:
        """Begin to make worker `index`; gives its handle."""

    def give(self, worker: Any, task: Any) -> None:
        """Let a worker that is ready tell a story."""

    def halt(self, worker: Any) -> None:
        """Ask a worker to end its story after the step in hand."""

    def discard(self, worker: Any) -> None:
        """End a worker at once, unless it is gone."""

    def heard(self, workers: dict[int, Any]) -> Iterator[tuple[int, str, Any]]:
        """(index, kind, content) of what workers said, after a short wait where they said nothing. Kinds, beside those
        of `steps`: "ready"; "broken", the worker cannot be made, content says why; "lost", it died."""


def tell(
    carrier: Carrier, count: int, tasks: Sequence[Any], stopping: Callable[[], bool] = lambda: False
) -> Iterator[Event]:
    """Let workers tell stories.

    Args:
        carrier: where they live.
        count: how many there are, at most.
        tasks: the stories; what `Worker.tell` takes.
        stopping: no further story is begun once it says so, and workers end theirs after the step in hand.

    Returns:
        An iterator of what happens. Where it is closed before its end, workers end at once.

    Raises:
        MemFlowError: workers cannot be made.
    """
    waiting, losses, early = deque(range(len(tasks))), Counter(), 0
    workers: dict[int, Any] = {}  # by number
    busy: dict[int, int] = {}  # worker to task
    ready: set[int] = set()
    halted = False
    try:
        while waiting or busy:
            if stopping() and not halted:
                halted = True
                waiting.clear()
                for index in busy:
                    carrier.halt(workers[index])
            wanted = max(0, len(waiting) + len(busy) - len(workers))
            for index in [index for index in range(count) if index not in workers][:wanted]:
                workers[index] = carrier.start(index)
            for index in sorted(ready)[: len(waiting)]:
                ready.remove(index)
                busy[index] = waiting.popleft()
                carrier.give(workers[index], tasks[busy[index]])
            for index, kind, content in carrier.heard(workers):
                task = busy.get(index)
                if kind == "ready":
                    ready.add(index)
                    early = 0
                elif kind == "broken":
                    raise MemFlowError(content)
                elif kind == "lost":
                    carrier.discard(workers.pop(index))
                    ready.discard(index)
                    if task is None:
                        early += 1
                        if early >= _LIVES:
                            raise MemFlowError(f"workers die before they tell a story ({content})")
                        continue
                    del busy[index]
                    losses[task] += 1
                    if losses[task] >= _LIVES:
                        kind, content = "failed", f"{_LIVES} workers died of it, the last one {content}"
                    elif not halted:
                        waiting.appendleft(task)
                    yield Event(task, index, kind, content)
                else:
                    if kind in ("told", "failed"):
                        del busy[index]
                        ready.add(index)
                    yield Event(task, index, kind, content)
    finally:
        for worker in workers.values():
            carrier.discard(worker)


def steps(worker: Worker, task: Any, stopping: Callable[[], bool]) -> Iterator[tuple[str, Any]]:
    """(kind, content) of a story while it is told, for a carrier to hand on: what fails becomes a sentence, and what is
    warned of is said."""
    said: list[str] = []
    with warned(said.append):
        try:
            for step in worker.tell(task, stopping):
                yield from (("said", sentence) for sentence in dict.fromkeys(said))
                said.clear()
                yield "step", step
        except MemFlowError as error:
            yield "failed", str(error)
        except Exception as error:  # a defect ends one story, not all
            traceback.print_exc()
            yield "failed", f"{type(error).__name__}: {error}"
        else:
            yield "told", ""


def made(make: Callable[[int], Worker], index: int) -> tuple[Worker | None, str]:
    """A worker; or None, and why there is none."""
    try:
        return make(index), ""
    except MemFlowError as error:
        return None, str(error)
    except Exception as error:
        traceback.print_exc()
        return None, f"a worker cannot be made: {type(error).__name__}: {error}"


class _Process(NamedTuple):
    process: multiprocessing.process.BaseProcess
    pipe: multiprocessing.connection.Connection


class Processes:
    """Workers that are processes of this machine.

    Args:
        make: makes worker number `index` in its process; can be pickled.
    """

    def __init__(self, make: Callable[[int], Worker]):
        self._make = make
        self._context = multiprocessing.get_context("spawn")  # a fork would share the threads of torch

    def start(self, index: int) -> _Process:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(self._make, index, theirs), daemon=True)
        process.start()
        theirs.close()
        return _Process(process, ours)

    def give(self, worker: _Process, task: Any) -> None:
        self._send(worker, task)

    def halt(self, worker: _Process) -> None:
        self._send(worker, None)

    def discard(self, worker: _Process) -> None:
        worker.pipe.close()
        worker.process.kill()
        worker.process.join()

    def heard(self, workers: dict[int, _Process]) -> Iterator[tuple[int, str, Any]]:
        by_pipe = {worker.pipe: index for index, worker in workers.items()}
        for pipe in wait(list(by_pipe), timeout=0.2):
            index = by_pipe[pipe]
            try:
                yield index, *pipe.recv()
            except (EOFError, OSError):
                process = workers[index].process
                process.join(5)
                code = process.exitcode
                yield index, "lost", f"killed by signal {-code}" if code and code < 0 else f"ended with code {code}"

    @staticmethod
    def _send(worker: _Process, task: Any) -> None:
        with suppress(OSError):  # it died; `heard` says so
            worker.pipe.send(task)


def _work(make: Callable[[int], Worker], index: int, pipe) -> None:
    """A worker process, from its beginning to the end of the pipe. Ctrl-C in a terminal reaches it too and is left to
    whoever started it; SIGTERM, and the end of that process, end the story after the step in hand."""
    ended = threading.Event()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: ended.set())

    def say(message: tuple[str, Any]) -> None:
        with suppress(OSError):  # nobody is there any more: the story is still to be saved
            pipe.send(message)

    worker, reason = made(make, index)
    say(("ready", "") if worker else ("broken", reason))
    while worker and not ended.is_set():
        if not pipe.poll(0.2):
            continue
        try:
            task = pipe.recv()
        except (EOFError, OSError):
            return
        if task is not None:  # None: a halt that came when the story had ended
            for message in steps(worker, task, lambda: ended.is_set() or pipe.poll()):
                if message[0] == "told" and ended.is_set():
                    return  # by a signal to this process alone: another one goes on with the story
                say(message)

"""Workers of a pool that are actors of a Ray cluster, one on every GPU, or on a CPU core each where there is none."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any

from memflow.errors import MemFlowError, install_command
from memflow.tellers.pool import Worker, made, steps


@contextmanager
def cluster(address: str) -> Iterator[dict[str, float]]:
    """Connect to a Ray cluster, and leave it at the end.

    Args:
        address: of the cluster; "": of the one that RAY_ADDRESS names or that runs here, else one is started on this
            machine, and ended with the block.

    Yields:
        What the cluster has in all, "CPU" and "GPU" for example.

    Raises:
        MemFlowError: Ray is not installed, or there is no such cluster.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # a warning of what will change in Ray
    try:
        import ray
    except ModuleNotFoundError:
        raise MemFlowError(f"--ray needs the package 'ray': {install_command('ray')}") from None
    _reach(address)
    try:
        ray.init(address or None, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise MemFlowError(f"--ray {address}: there is no such cluster: {error}") from None
    try:
        # Ray's own words about a worker that died go to stdout; the pool says it in its own.
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            yield ray.cluster_resources()
    finally:
        ray.shutdown()


def share(resources: dict[str, float], device: str | None) -> tuple[dict[str, float], int]:
    """What one model takes of a cluster, a GPU where there are any, in Ray's words; and how many models fit."""
    kind = "GPU" if resources.get("GPU") and device != "cpu" else "CPU"
    return {f"num_{kind.lower()}s": 1}, max(1, int(resources.get(kind, 1)))


def _reach(address: str) -> None:
    """Raise MemFlowError where nobody answers at HOST:PORT: Ray itself tries for minutes."""
    host, _, port = address.rpartition(":")
    if not address or address in ("auto", "local"):
        return
    if not host or not port.isdecimal():
        raise MemFlowError(f"--ray {address}: HOST:PORT is needed, the address that `ray start --head` says")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise MemFlowError(f"--ray {address}: there is no such cluster: {error}") from None


class Actors:
    """Workers that are actors of the cluster that this process is connected to.

    Args:
        make: makes worker number `index` where it works; memflow is installed there.
        resources: that each takes, "num_gpus" or "num_cpus".
    """

    def __init__(self, make: Callable[[int], Worker], resources: dict[str, float]):
        import ray

        self._ray, self._make = ray, make
        # A thread for the story, one for `halt`. A new one is made by the pool where one dies.
        self._class = ray.remote(_Actor).options(**resources, max_concurrency=2, max_restarts=0)

    def start(self, index: int) -> _Handle:
        actor = self._class.remote()
        return _Handle(actor, actor.load.remote(self._make, index))

    def give(self, worker: _Handle, task: Any) -> None:
        worker.pending = worker.actor.tell.options(num_returns="streaming").remote(task)

    def halt(self, worker: _Handle) -> None:
        worker.actor.halt.remote()

    def discard(self, worker: _Handle) -> None:
        self._ray.kill(worker.actor)

    def heard(self, workers: dict[int, _Handle]) -> Iterator[tuple[int, str, Any]]:
        pending = {worker.pending: index for index, worker in workers.items() if worker.pending is not None}
        if not pending:
            return
        found, _ = self._ray.wait(list(pending), num_returns=len(pending), timeout=0.2)
        for source in found:
            index = pending[source]
            try:
                yield from ((index, *message) for message in self._messages(workers[index], source))
            except self._ray.exceptions.RayTaskError as error:  # outside our own code: memflow is not there, for one
                yield index, "broken", f"a worker cannot be reached: {str(error).strip().splitlines()[-1]}"
            except self._ray.exceptions.RayError as error:
                yield index, "lost", str(error).splitlines()[0].rstrip(".")

    def _messages(self, worker: _Handle, source: Any) -> Iterator[tuple[str, Any]]:
        """All that a worker has said by now."""
        if isinstance(source, self._ray.ObjectRef):
            message, worker.pending = self._ray.get(source), None
            yield message
            return
        while self._ray.wait([source], timeout=0)[0]:
            try:
                message = self._ray.get(next(source))
            except StopIteration:
                return
            if message[0] in ("told", "failed"):
                worker.pending = None
            yield message
            if worker.pending is not source:
                return


@dataclass
class _Handle:
    """pending: what the actor was asked last and has not answered yet."""

    actor: Any
    pending: Any


class _Actor:
    def __init__(self):
        self._stop = threading.Event()

    def load(self, make: Callable[[int], Worker], index: int) -> tuple[str, str]:
        self._worker, reason = made(make, index)
        return ("ready", "") if self._worker else ("broken", reason)

    def tell(self, task: Any) -> Iterator[tuple[str, Any]]:
        yield from steps(self._worker, task, self._stop.is_set)

    def halt(self) -> None:
        self._stop.set()

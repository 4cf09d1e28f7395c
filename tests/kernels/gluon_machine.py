"""A chip for Gluon kernels on the CPU: groups of warps, barriers, shared memory, bulk copies, asynchronous products.

Every partition of a program is a thread, and one runs at a time: at each operation that others can notice, a seed
decides who goes on and whether a copy that is under way lands. So a run can be repeated, and partitions that wait for
each other for ever are seen at once. What the hardware leaves undefined is made visible: shared memory is NaN until
something has arrived, and again from the moment at which a copy into it is asked for; the operands of a product must be
the same when it is waited for as when it was given out.

It shows neither layouts, nor the order of ordinary and asynchronous accesses (fences), nor speed.
"""

from __future__ import annotations

import linecache
import random
import sys
import threading
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

KERNEL = "<gluon "  # what the file names of kernels begin with


class Fault(AssertionError):
    """What a kernel did that the hardware would not forgive."""


class Stopped(BaseException):
    """Ends the other partitions after a fault."""


def source_line(but_for: str = "") -> tuple[int, str]:
    """Number and text of the kernel's line that is being executed, the innermost one outside of a file `but_for`."""
    frame = sys._getframe(1)
    while frame and (not (file := frame.f_code.co_filename).startswith(KERNEL) or file == but_for):
        frame = frame.f_back
    if frame is None:
        return 0, ""
    return frame.f_lineno, linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()


class Product(NamedTuple):
    """A product given out: its value, its operands in shared memory as they were, and the line that gave it out."""

    value: np.ndarray
    operands: list[tuple[np.ndarray, np.ndarray]]
    line: str


class Partition:
    """A group of warps: its thread, what it waits for, its products in flight."""

    def __init__(self, name: str, run: Callable[[], None]):
        self.name, self.run = name, run
        self.ready: Callable[[], bool] = lambda: True
        self.waits = ""
        self.done = False
        self.turn = threading.Semaphore(0)
        self.products: list[Product] = []


class Machine:
    """One program. The thread that made it is a partition, too, until it hands over to others."""

    current: Machine

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.me = Partition("program", lambda: None)
        self.partitions = [self.me]
        self.flying: list[Callable[[], None]] = []
        self.queue: list[Callable[[], None]] = []  # what happens one after the other
        self.targets: list[np.ndarray] = []  # of the copies under way
        self.barriers: list[Barrier] = []
        self.history: list[str] = []  # who gave out a product that others run beside
        self.fault: BaseException | None = None
        Machine.current = self

    def pause(self, waits: str = "", ready: Callable[[], bool] = lambda: True) -> None:
        """Let others go on, perhaps; come back once `ready`."""
        me = self.me
        me.ready, me.waits = ready, waits
        if waits:
            number, text = source_line()
            me.waits = f"{waits} (line {number}: {text})"
        if self._hand_over() is not me:
            me.turn.acquire()
        if self.fault:
            raise Stopped

    def _hand_over(self) -> Partition | None:
        """Choose who goes on and wake them; None once all are done or stopped."""
        while not self.fault:
            left = [p for p in self.partitions if not p.done]
            able = [p for p in left if p.ready()]
            if self.flying and (not able or self.random.random() < 0.25):
                self._try(self.flying.pop(self.random.randrange(len(self.flying))))
            elif able:
                following = self.random.choice(able)
                if following is not self.me:
                    self.me = following
                    following.turn.release()
                return following
            elif left:
                waiting = "; ".join(f"{p.name} waits for {p.waits}" for p in left)
                self.fault = Fault(f"deadlock: {waiting}")
            else:
                return None
        for p in self.partitions:
            p.turn.release()
        return None

    def _try(self, run: Callable[[], None]) -> None:
        try:
            run()
        except Stopped:
            pass
        except BaseException as error:
            number, text = source_line()
            traceback = error.__traceback__
            while traceback:
                if traceback.tb_frame.f_code.co_filename.startswith(KERNEL):
                    number = traceback.tb_lineno
                    text = linecache.getline(traceback.tb_frame.f_code.co_filename, number).strip()
                traceback = traceback.tb_next
            kind = "" if isinstance(error, Fault) else f"{type(error).__name__}: "
            self.fault = self.fault or Fault(f"{self.me.name}, line {number} ({text}): {kind}{error}")

    def specialize(self, partitions: list[Partition]) -> None:
        """Run the partitions to their end in place of the program's own warps."""
        self.partitions = partitions

        def life(partition: Partition) -> None:
            partition.turn.acquire()
            if not self.fault:
                self._try(partition.run)
            partition.done = True
            self._hand_over()

        threads = [threading.Thread(target=life, args=(p,), daemon=True) for p in partitions]
        for thread in threads:
            thread.start()
        self.me = Partition("program", lambda: None)
        self._hand_over()
        for thread in threads:
            thread.join()
        if self.fault is None:
            self._check_end()
        if self.fault:
            raise self.fault

    def _check_end(self) -> None:
        if self.flying:
            self.fault = Fault("a copy or a product is still under way when the program ends")
        for partition in self.partitions:
            if partition.products:
                self.fault = Fault(f"{partition.name} ends with a product in flight: {partition.products[0].line}")
        for barrier in self.barriers:
            if barrier.bytes:
                self.fault = Fault(f"{barrier.name} still expects {barrier.bytes} bytes when the program ends")

    def in_order(self, run: Callable[[], None]) -> None:
        """`run` happens at some time behind all that was given here before."""
        self.queue.append(run)
        if len(self.queue) == 1:
            self.flying.append(self._advance)

    def _advance(self) -> None:
        self.queue[0]()
        self.queue.pop(0)
        if self.queue:
            self.flying.append(self._advance)

    def copy(self, data: np.ndarray, target: np.ndarray, barrier: Barrier, size: int) -> None:
        """Bulk copy: lands at some time, all of it together with its bytes on the barrier."""
        if any(np.shares_memory(target, other) for other in self.targets):
            raise Fault("two copies into the same place are under way")
        target[...] = np.nan
        self.targets.append(target)

        def land() -> None:
            target[...] = data.reshape(target.shape)
            self.targets = [other for other in self.targets if other is not target]
            barrier.complete(size)

        self.flying.append(land)
        self.pause()


class Barrier:
    """An mbarrier: a phase ends when all have arrived and all bytes that were announced have come."""

    def __init__(self, name: str):
        self.name = name
        self.count: int | None = None
        self.pending = self.bytes = self.phase = 0
        Machine.current.barriers.append(self)

    def init(self, count: int) -> None:
        self.count = self.pending = count

    def arrive(self, count: int = 1, expected_bytes: int = 0) -> None:
        """By the warps of a partition."""
        self.arrive_alone(count, expected_bytes)
        Machine.current.pause()

    def arrive_alone(self, count: int = 1, expected_bytes: int = 0) -> None:
        """By itself, when a product has run."""
        if self.count is None:
            raise Fault(f"{self.name} was not initialised")
        self.pending -= count
        self.bytes += expected_bytes
        if self.pending < 0:
            raise Fault(f"{self.name}: more than {self.count} arrivals in one phase")
        self._end_of_phase()

    def complete(self, size: int) -> None:
        """So many bytes have come."""
        self.bytes -= size
        self._end_of_phase()

    def _end_of_phase(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase ^= 1
            self.pending = self.count

    def wait(self, parity: int) -> None:
        """Until the phase of this parity is over; true at once of the phase before the first, of parity 1."""
        if self.count is None:
            raise Fault(f"{self.name} was not initialised")
        phase = int(parity) & 1
        what = f"the end of a phase of parity {phase} of {self.name}"
        Machine.current.pause(what, lambda: self.phase != phase)
        Machine.current.me.waits = ""

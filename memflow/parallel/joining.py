"""Processes that a launcher started for one story (`torchrun --nproc-per-node N -m memflow generate ...`): how they
meet, and how all of them end, with one message, when one does."""

from __future__ import annotations

import os
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from memflow.errors import MemFlowError, MemFlowWarning
from memflow.parallel import launched
from memflow.parallel.ranks import Ranks

_BEAT, _SILENT = 1.0, 15.0  # seconds between signs of life, and without one until a process counts as lost
_LOST = "one of the {} processes has ended without a word: killed, or out of memory?"


def own_device(name: str | None) -> str | None:
    """`name`, of --device, for this process: of GPUs that of its number on this machine."""
    if not launched() or name == "cpu" or not torch.cuda.is_available():
        return name
    if name not in (None, "cuda"):
        raise MemFlowError(f"--device {name}: each of several processes takes a GPU of its own: say cuda or cpu")
    if "LOCAL_RANK" not in os.environ:
        raise MemFlowError(f"{_says()}, but not which GPU it takes: LOCAL_RANK is missing, which torchrun sets")
    number, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if number >= there:
        raise MemFlowError(f"there are {there} GPUs for the processes on this machine: at most {there} can be started")
    return f"cuda:{number}"


def _says() -> str:
    return f"WORLD_SIZE={os.environ['WORLD_SIZE']} says that a launcher started this process with others"


class Joined(Ranks):
    """All processes of a launcher, and the store in which they leave word of how they end.

    Args:
        store: of torch.distributed.
    """

    def __init__(self, store: dist.Store):
        super().__init__()
        self.store = dist.PrefixStore("memflow", store)
        self.over, self.lost = threading.Event(), False
        threading.Thread(target=self._watch, daemon=True).start()

    def why(self, error: Exception) -> str | None:
        """What ended the others, where `error` says that they are gone; None where it says something else."""
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            return None
        self.lost = True
        try:
            word = self._word("failure", 3.0)
        except dist.DistError:  # with the process that had the store
            word = None
        return word or _LOST.format(self.size)

    def leave(self, error: BaseException) -> BaseException:
        """What to raise in place of `error` in this process, so that one of them all says why they end."""
        self.over.set()
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            said, word = None, f"process {self.rank} was stopped"
        else:
            said = str(error) if isinstance(error, MemFlowError) else self.why(error)
            word = said or f"process {self.rank}: {type(error).__name__}: {error}"
        speaks = self.first
        try:
            self.store.compare_set("failure", "", word)
            if self.first:
                self.store.set("said", "yes")
                for rank in range(1, self.size):  # the store may end with this process: the others come first
                    self._word(f"left-{rank}", 5.0)
            else:
                if self.lost and self._word("said", 5.0) is None:  # the first is gone: of the others one speaks
                    speaks = self.store.add("speaker", 1) == 1
                self.store.set(f"left-{self.rank}", "yes")
        except dist.DistError:  # the store was in the process that is gone
            speaks = self.rank == 1
        if said and not speaks:
            return SystemExit(2)
        return MemFlowError(said) if said else SystemExit(130) if isinstance(error, KeyboardInterrupt) else error

    def _word(self, key: str, seconds: float) -> str | None:
        """What somebody left under `key`, or leaves there within some seconds."""
        end = time.monotonic() + seconds
        while True:
            if self.store.check([key]):
                return self.store.get(key).decode()
            if time.monotonic() > end:
                return None
            time.sleep(0.1)

    def _watch(self) -> None:
        """End this process where another is gone and the main thread does not see it, waiting for a GPU for example."""
        store, beats = self.store.clone(), {}
        try:
            while True:
                if self.over.wait(_BEAT):
                    return
                store.set(f"beat-{self.rank}", str(time.monotonic()))
                for rank in range(self.size):
                    beat = store.get(f"beat-{rank}") if store.check([f"beat-{rank}"]) else b""
                    if beats.setdefault(rank, (beat, time.monotonic()))[0] != beat:
                        beats[rank] = beat, time.monotonic()
                if store.check(["failure"]) or any(time.monotonic() - since > _SILENT for _, since in beats.values()):
                    break
        except dist.DistError:
            pass
        if not self.over.wait(8.0 if self.first else 1.0):
            said = self.leave(dist.DistError())
            if isinstance(said, MemFlowError):
                print(f"memflow: {said}", file=sys.stderr, flush=True)
            os._exit(2)


@contextmanager
def meet(device: str | None) -> Iterator[Ranks]:
    """The processes that a launcher started, this one among them, until all of them are here again.

    Args:
        device: as --device says.
    """
    on_gpu = torch.cuda.is_available() and device != "cpu"
    if on_gpu:
        torch.cuda.set_device(own_device(device))
    try:
        store, rank, size = next(dist.rendezvous("env://"))
    except ValueError as error:
        raise MemFlowError(f"{_says()}, but not how it meets them: {error}") from None
    # Whoever waits, waits for as long as it takes: who is gone is seen otherwise.
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=size, timeout=timedelta(days=7)
    )
    ranks = Joined(store)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers")  # of functions that torch renames
        if not ranks.first:
            warnings.simplefilter("ignore", MemFlowWarning)
        try:
            yield ranks
            ranks.any(False)  # a launcher ends the others when one has ended, and the first may still be writing
        except BaseException as error:
            said = ranks.leave(error)
            if said is error:
                raise
            raise said from error
    ranks.over.set()
    dist.destroy_process_group()

"""The processes that make one story together: what they exchange; and, where a launcher started them (`torchrun
--nproc-per-node N -m memflow generate ...`), how they meet, and all end, with one message, when one does.

Outside self-attention each has some tokens of a call with all heads, inside it and in the pool all tokens with some
heads.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from memflow.errors import MemFlowError, MemFlowWarning
from memflow.parallel import Alone, T, launched

_BEAT, _SILENT = 1.0, 15.0  # seconds between signs of life, and without one until a process counts as lost
_LOST = "one of the {} processes has ended without a word: killed, or out of memory?"


class Ranks(Alone):
    """All processes of torch.distributed's default group, which has been initialised: gloo for tensors on the CPU, and
    NCCL for those on GPUs."""

    def __init__(self):
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def to_heads(self, *states: Tensor) -> tuple[Tensor, ...]:
        together = torch.stack(states).unflatten(3, (self.size, -1)).movedim(3, 0)  # [whose heads, n, B, l, h, D]
        return _exchanged(together).movedim(0, 2).flatten(2, 3).unbind(0)

    def to_tokens(self, states: Tensor) -> Tensor:
        by_tokens = states.unflatten(1, (self.size, -1)).movedim(1, 0)  # [whose tokens, B, l, h, D]
        return _exchanged(by_tokens).movedim(0, 2).flatten(2, 3)

    def all_heads(self, states: Tensor) -> Tensor:
        return self._gathered(states).movedim(0, -3).flatten(-3, -2)

    def mine(self, states: Tensor) -> Tensor:
        heads = states.shape[-2] // self.size
        return states.narrow(-2, self.rank * heads, heads)

    def collect(self, states: Tensor) -> Tensor:
        *leading, heads, width = states.shape
        whole = torch.empty((*leading, self.size * heads, width) if self.first else (0,), dtype=states.dtype)
        for index, part in enumerate(states if states.numel() else ()):  # layer by layer: a GPU has no room for all
            part = part.contiguous()
            parts = [torch.empty_like(part) for _ in range(self.size)] if self.first else None
            dist.gather(part, parts)
            if self.first:
                torch.cat([part.cpu() for part in parts], -2, out=whole[index])
        return whole

    def mean(self, x: Tensor) -> Tensor:
        return self._gathered(x).mean(0)

    def any(self, flag: bool) -> bool:
        said = torch.tensor([flag], dtype=torch.uint8)
        dist.all_reduce(said, dist.ReduceOp.MAX)
        return bool(said)

    def from_first(self, run: Callable[[], T]) -> T:
        found = [None, None]
        if self.first:
            try:
                found[0] = run()
            except Exception as error:
                found[1] = error
        dist.broadcast_object_list(found, device=torch.device("cpu"))
        if found[1] is not None:
            raise found[1]
        return found[0]

    def _gathered(self, x: Tensor) -> Tensor:
        """[size, ...]: all processes' x."""
        parts = x.new_empty((self.size, *x.shape))
        if x.numel():
            dist.all_gather(list(parts.unbind()), x.contiguous())
        return parts


def _exchanged(parts: Tensor) -> Tensor:
    """parts [size, ...], one for each process -> what each of them had for this one, in their order."""
    parts = parts.contiguous()
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts)
    return received


def numbers_that_do(heads: int, calls: Iterable[int]) -> list[int]:
    """How many processes can make a story together.

    Args:
        heads: of a layer.
        calls: tokens of each kind of call.

    Returns:
        All numbers that divide both, 1 first.
    """
    calls = list(calls)
    return [n for n in range(1, heads + 1) if heads % n == 0 and all(tokens % n == 0 for tokens in calls)]


def require_division(size: int, heads: int, calls: Iterable[int] = ()) -> None:
    """MemFlowError, with the numbers that would do, where `size` processes cannot share a model's heads or tokens.

    Args:
        size: processes.
        heads: of a layer.
        calls: tokens of each kind of call; none: they are not known yet.
    """
    calls = sorted(calls)
    good = numbers_that_do(heads, calls)
    if size not in good:
        tokens = f" and calls of {', '.join(f'{count:,}' for count in calls)} tokens" if calls else ""
        raise MemFlowError(
            f"{size} processes cannot share a model of {heads} heads{tokens}: their number must divide both; "
            f"{', '.join(map(str, good))} would do"
        )


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

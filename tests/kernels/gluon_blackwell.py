"""Blackwell's tensor memory and products on the CPU, on the machine of gluon_machine.py.

The products of a partition run in the order in which they are given out, each at some time. Until its products have
run, nobody may touch a tile of tensor memory that they write; what they read must stay as it was.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from gluon_language import Tensor, Tile, ignored, mbarrier, tma
from gluon_machine import Barrier, Fault, Machine, source_line


class Place:
    """Columns of tensor memory: what lies there, in which format, and how many products on the way write to it."""

    def __init__(self):
        self.values: np.ndarray | None = None
        self.dtype: torch.dtype | None = None
        self.writers = 0


class TensorMemory:
    """A tile of tensor memory, seen as numbers of one format; several of them with `index`."""

    def __init__(self, places: list[Place], dtype: torch.dtype, shape: list[int]):
        self.places, self.dtype, self.shape = places, dtype, [int(n) for n in shape]

    @property
    def place(self) -> Place:
        (place,) = self.places
        return place

    def index(self, i):
        return TensorMemory([self.places[int(i)]], self.dtype, self.shape[1:])

    def slice(self, start, length):
        if start:
            raise Fault("only the left part of a tile is modelled")
        return TensorMemory(self.places, self.dtype, [self.shape[0], length])

    def reinterpret(self, dtype, shape, layout):
        held = self.shape[0] * self.shape[1] * self.dtype.itemsize
        if shape[0] * shape[1] * dtype.itemsize > held:
            raise Fault(f"{dtype} {shape} in the memory of {self.dtype} {self.shape}")
        return TensorMemory(self.places, dtype, shape)

    def read(self) -> np.ndarray:
        if self.place.writers:
            raise Fault("tensor memory is read while a product writes it")
        if self.place.values is None or self.place.dtype != self.dtype:
            raise Fault(f"tensor memory is read as {self.dtype} and holds {self.place.dtype or 'nothing'}")
        return self.place.values

    def load(self, layout=None):
        Machine.current.pause()
        return Tensor(self.read().copy(), self.dtype)

    def store(self, value):
        if self.place.writers:
            raise Fault("tensor memory is written while a product writes it")
        if value.dtype != self.dtype or list(value.values.shape) != self.shape:
            raise Fault(f"{value.dtype} {list(value.values.shape)} into {self.dtype} {self.shape}")
        self.place.values, self.place.dtype = value.values.copy(), self.dtype
        Machine.current.pause()


def allocate_tensor_memory(dtype, shape, layout):
    return TensorMemory([Place() for _ in range(shape[0])], dtype, shape)


def tcgen05_mma(a, b, acc, *, use_acc=True, mbarriers=()):
    """Given out; once it has run, so have all before it, and the barriers see an arrival."""
    number, text = source_line()
    read = [lambda x=x: x.values if isinstance(x, Tile) else x.read() for x in (a, b)]
    before = [operand().copy() for operand in read]
    if any(np.isnan(values).any() for values in before):
        raise Fault("a product reads shared memory in which nothing has arrived")
    if a.dtype != b.dtype:
        raise Fault(f"a product of {a.dtype} and {b.dtype}")
    acc.place.writers += 1
    Machine.current.history.append(Machine.current.me.name)

    def run() -> None:
        acc.place.writers -= 1
        now = [x.values if isinstance(x, Tile) else x.place.values for x in (a, b)]
        if any(not np.array_equal(x, y) for x, y in zip(now, before, strict=True)):
            raise Fault(f"an operand changed while its product was in flight: line {number}: {text}")
        value = (before[0] @ before[1]).astype(np.float32)
        if use_acc:
            if acc.place.dtype != torch.float32:
                raise Fault(f"a product adds to tensor memory that holds {acc.place.dtype or 'nothing'}")
            value = value + acc.place.values
        acc.place.values, acc.place.dtype = value, torch.float32
        for barrier in mbarriers:
            barrier.arrive_alone()

    Machine.current.in_order(run)
    Machine.current.pause()


def tcgen05_commit(barrier: Barrier):
    """The barrier sees an arrival once all products so far have run."""
    Machine.current.in_order(barrier.arrive_alone)
    Machine.current.pause()


blackwell = SimpleNamespace(
    TensorMemoryLayout=ignored,
    allocate_tensor_memory=allocate_tensor_memory,
    fence_async_shared=ignored,
    mbarrier=mbarrier,
    tcgen05_commit=tcgen05_commit,
    tcgen05_mma=tcgen05_mma,
    tensor_memory_descriptor=TensorMemory,
    tma=tma,
)

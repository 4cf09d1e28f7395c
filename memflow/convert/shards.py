"""Weights written piece by piece into safetensors files: never more than a block of a tensor in memory."""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from memflow.convert.lora import Update
from memflow.errors import MemFlowError
from memflow.files import tensors_header, write_whole

_BLOCK = 32 * 2**20  # bytes of a tensor in hand at a time
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_PAGEOUT = 21  # MADV_PAGEOUT of Linux 5.4; Python's mmap has no name for it


class Weight(NamedTuple):
    """One tensor to write."""

    name: str
    source: Tensor  # mapped from an original file
    dtype: torch.dtype
    updates: tuple[Update, ...] = ()  # added to it (2-d weights)
    origin: str = ""  # how errors call it

    @property
    def nbytes(self) -> int:
        return self.source.numel() * self.dtype.itemsize

    def blocks(self) -> Iterator[Tensor]:
        """The bytes to write, in order, uint8 [n]. What was mapped of the source is let go again. MemFlowError for
        numbers that are none."""
        rows = self.source if self.source.ndim else self.source[None]
        step = max(1, _BLOCK // max(1, rows[:1].numel() * 4))
        for start in range(0, len(rows), step):
            mapped = block = rows[start : start + step]
            for update in self.updates:
                block = update.added_to(block, start)
            block = block.to(self.dtype).contiguous()
            if not torch.isfinite(block).all():
                given = torch.isfinite(mapped).all()
                what = f"has numbers that {self.dtype} cannot hold" if given else "holds NaN or infinity"
                raise MemFlowError(f"{self.origin} {what}")
            yield block.view(-1).view(torch.uint8)
            _release(mapped)


class Shard(NamedTuple):
    """One file of a model's weights."""

    file: str
    weights: list[Weight]

    @property
    def nbytes(self) -> int:
        return sum(weight.nbytes for weight in self.weights)


def plan_shards(weights: list[Weight], stem: str, limit: int) -> list[Shard]:
    """The files to write, named as libraries do.

    Args:
        weights: In the order in which they are written.
        stem: What the names begin with.
        limit: Bytes of a file, at most, but for one of a single larger tensor.
    """
    groups: list[list[Weight]] = []
    for weight in weights:
        if not groups or sum(w.nbytes for w in groups[-1]) + weight.nbytes > limit:
            groups.append([])
        groups[-1].append(weight)
    if len(groups) == 1:
        return [Shard(f"{stem}.safetensors", groups[0])]
    return [Shard(f"{stem}-{i:05}-of-{len(groups):05}.safetensors", group) for i, group in enumerate(groups, start=1)]


def write_shards(shards: list[Shard], folder: Path, stem: str, advance: Callable[[int], None]) -> None:
    """Write what is not there yet, and the index. A file has its name only once it is complete.

    Args:
        shards: The files.
        folder: Where to write.
        stem: What the name of the index begins with.
        advance: Is called with the number of bytes that have been dealt with, finished files included.
    """
    for shard in shards:
        path = folder / shard.file
        if path.is_file() and path.stat().st_size == len(_header(shard)) + shard.nbytes:
            advance(shard.nbytes)
            continue
        write_whole(path, partial(_write, shard, advance))
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(shard.nbytes for shard in shards)},
            "weight_map": {weight.name: shard.file for shard in shards for weight in shard.weights},
        }
        text = json.dumps(index, indent=2) + "\n"
        write_whole(folder / f"{stem}.safetensors.index.json", lambda file: file.write(text.encode()))


def check_room(output: Path, needed: int) -> None:
    """Raise MemFlowError where so many bytes do not fit in a folder, which need not be there yet."""
    parent = next(folder for folder in (output, *output.resolve().parents) if folder.is_dir())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise MemFlowError(f"{output}: needs {needed / 1e9:.2f} GB, and only {free / 1e9:.2f} GB are free there")


def _write(shard: Shard, advance: Callable[[int], None], file: BinaryIO) -> None:
    file.write(_header(shard))
    for weight in shard.weights:
        for block in weight.blocks():
            file.write(block.numpy())
            advance(block.numel())


def _header(shard: Shard) -> bytes:
    tensors = ((w.name, DTYPES[w.dtype], list(w.source.shape), w.nbytes) for w in shard.weights)
    return tensors_header({"format": "pt"}, tensors, separators=(",", ":"))


def _release(mapped: Tensor) -> None:
    """Let the system take back the memory of the file pages behind `mapped`: they are read again if they are needed.

    Without this the whole source file would count as memory in use by the end. The advice never loses data, whatever
    the memory is, and a system that does not know it ignores it.
    """
    begin = math.ceil(mapped.data_ptr() / mmap.PAGESIZE) * mmap.PAGESIZE
    length = (mapped.data_ptr() + mapped.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - begin
    if sys.platform == "linux" and mapped.is_contiguous() and length > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), _PAGEOUT)

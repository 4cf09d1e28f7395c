"""The launch of an attention forward but for its pointers, which is the same for all calls of one kind.

Planning (configuration, schedule, grids, strides, tensor descriptors) costs the host more than launching does. A plan
holds no tensor: it keeps no memory alive, and a CUDA graph captures only what a launch allocates and launches.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .attention_schedule import combine_kernel
from .attention_tiles import LOG2_E
from .descriptors import Form
from .integers import next_power_of_2
from .layouts import Layout

KEPT = 256  # plans; a memory that grows to 15 frames has some 20 kinds of calls


class Call(NamedTuple):
    """All that a plan depends on: the arguments as in the reference, tensors as layouts.

    table: the shape of the frame table. only_incomplete: only heads whose table has an empty place.
    """

    device: torch.device
    query: Layout
    key: Layout
    value: Layout
    table: tuple[int, ...] | None
    tokens_per_frame: int
    candidate_frames: int
    query_block: int | None
    only_incomplete: bool = False

    @property
    def block_sizes(self) -> tuple[int, int]:
        """Queries per block, and number of blocks; all queries are one block where they are not cut."""
        queries = self.query.shape[1]
        size = min(self.query_block or queries, queries)
        return size, -(-queries // size)

    @property
    def chosen(self) -> tuple[int, int]:
        """Places of a row of the table, and candidate frames; without a table no frame is a candidate."""
        if self.table is None:
            return 0, 0
        return self.table[-1] if self.candidate_frames else 0, self.candidate_frames


class Pieces(NamedTuple):
    """How tiles in pieces are put together: the launch of combine_kernel."""

    grid: tuple[int, int]
    numbers: tuple[int, ...]


class Plan(NamedTuple):
    """kernel[grid](*operands, frame_table, out, lse, partial_out, partial_lse, scale, *numbers, **options).

    operands: a number (0 query, 1 key, 2 value, 3 None) and the form of the descriptor that is passed in its place.
    numbers: constants of the kernel too, since Triton takes longer to bind arguments by name. partial: shape of
    partial_out.
    """

    kernel: object
    grid: tuple[int]
    operands: tuple[tuple[int, Form | None], ...]
    numbers: tuple[int, ...]
    options: dict[str, object]
    partial: tuple[int, int, int]
    pieces: Pieces | None

    def launch(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        frame_table: Tensor | None,
        scale: float,
        out: Tensor,
        lse: Tensor,
    ) -> None:
        """Writes out and lse, contiguous; scale is positive."""
        device, partial = query.device, self.partial
        if frame_table is None:
            frame_table = torch.empty(0, dtype=torch.int32, device=device)
        tensors = (query, key, value, None)
        operands = [tensors[n] if form is None else form.of(tensors[n]) for n, form in self.operands]
        partial_out = torch.empty(partial, dtype=torch.float32, device=device)
        partial_lse = torch.empty(partial[:2], dtype=torch.float32, device=device)
        self.kernel.run(  # what kernel[grid] calls, with all arguments once more
            *operands, frame_table.contiguous(), out, lse, partial_out, partial_lse,
            scale * LOG2_E, *self.numbers, grid=self.grid, warmup=False, **self.options,
        )  # fmt: skip
        if self.pieces is not None:
            grid, numbers = self.pieces
            combine_kernel.run(partial_out, partial_lse, out, lse, *numbers, grid=grid, warmup=False)


def plan(
    call: Call,
    kernel: object,
    operands: tuple[tuple[int, Form | None], ...],
    numbers: tuple[int, ...],
    options: dict[str, object],
    rows: int,
    tiles: int,
    whole: int,
    pieces: int,
) -> Plan:
    """The plan of a kernel for tiles of `rows` queries, of which those from `whole` on are in `pieces`.

    numbers, options: as in `Plan`.
    """
    _, queries, heads, head_dim = call.query.shape
    shared = (tiles - whole) * pieces
    combining = None
    if shared:
        rows_each = min(rows, 16)
        constants = {"D": head_dim, "D_PAD": max(16, next_power_of_2(head_dim)), "BM": rows, "ROWS": rows_each}
        sizes = (queries, heads, *call.block_sizes, whole, pieces)
        combining = Pieces((tiles - whole, rows // rows_each), (*sizes, *in_order(combine_kernel, constants)))
    return Plan(kernel, (whole + shared,), operands, numbers, options, (shared, rows, head_dim), combining)


def in_order(kernel: object, constants: dict[str, object]) -> tuple[object, ...]:
    """The constants of a kernel, which are its last arguments, as it takes them without their names."""
    names = kernel.arg_names[-len(constants) :]
    if set(names) != set(constants):
        raise TypeError(f"{kernel.__name__}: its last arguments are {names}, got {sorted(constants)}")
    return tuple(constants[name] for name in names)

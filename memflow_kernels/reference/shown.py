"""Which keys a table of frames shows: ranges that are read where they lie, or frames gathered per head.

On the CPU the table is read: where all heads have the same few runs of frames (the masks of training, a choice that is
the same for all) nothing is copied. On another device the host would have to wait for its numbers.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..dtypes import statistics_dtype

RUNS = 3  # ranges that are attended to one by one rather than gathered
HALF = (torch.bfloat16, torch.float16)
SMALL = 2**17  # numbers of always visible keys that are copied next to the chosen ones, rather than merged with them


class Range(NamedTuple):
    """Tokens that every head sees, read in place."""

    start: int
    stop: int

    bias = None

    def of(self, states: Tensor) -> Tensor:
        return states[:, self.start : self.stop]

    def add(self, total: Tensor, gradient: Tensor) -> None:
        """Adds the gradient of what `of` gave to that of all states."""
        total[:, self.start : self.stop] += gradient


@lru_cache(maxsize=64)
def _lines(sizes: tuple, strides: tuple, tokens_per_frame: int, candidate_frames: int) -> tuple[Tensor, Tensor, int]:
    """Where the lines of head_dim numbers of dense CPU states [B, L, H, D] lie, counted in lines from the first number.

    Those of frame 0 [B, H, 1, N], those of the frames behind the candidates [B, H, rest], and how many there are. The
    strides, of batch, tokens and heads, are counted in lines too.
    """
    rows, tokens, heads = (
        torch.arange(size, device="cpu") * stride for size, stride in zip(sizes, strides, strict=True)
    )
    lines = rows[:, None, None] + heads[:, None] + tokens  # [B, H, L]
    last = sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    behind = lines[..., candidate_frames * tokens_per_frame :].contiguous()
    return lines[..., None, :tokens_per_frame].contiguous(), behind, last + 1


class Gathered:
    """Frames that each head has chosen, copied next to each other: table [B, H, n], -1 is an empty place.

    numbers: those of the table, a row per batch row and head, where they can be read. rest: copied behind them.
    """

    def __init__(
        self,
        table: Tensor,
        numbers: list[list[int]] | None,
        tokens_per_frame: int,
        dtype: torch.dtype,
        rest: Range | None = None,
    ) -> None:
        self.tokens_per_frame, self.rest, self.numbers = tokens_per_frame, rest, numbers
        some_empty = numbers is None or any(-1 in row for row in numbers)
        self.different = not some_empty and all(len(set(row)) == len(row) for row in numbers)
        self.empty = self.bias = None
        self.index = table.long()
        self.found: tuple[tuple, Tensor, int] | None = None  # the lines, for states of these sizes and strides
        if some_empty:
            self.empty = (table < 0).repeat_interleave(tokens_per_frame, -1)  # [B, H, n*N + rest]
            if rest is not None:
                self.empty = torch.nn.functional.pad(self.empty, (0, rest.stop - rest.start))
            self.index = self.index.clamp(min=0)  # frame 0 stands in, and may hold anything
            self.bias = torch.zeros(self.empty.shape, dtype=dtype, device=table.device)
            self.bias = self.bias.masked_fill(self.empty, -torch.inf).unsqueeze(2)  # [B, H, 1, n*N + rest]

    def _frames(self, states: Tensor) -> Tensor:
        return states.unflatten(1, (-1, self.tokens_per_frame)).permute(0, 3, 1, 2, 4)  # [B, H, F, N, D]

    def _at(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Batch row, head and frame, to index frames with."""
        batch, heads, _ = index.shape
        rows, columns = torch.arange(batch, device=index.device), torch.arange(heads, device=index.device)
        return rows[:, None, None], columns[:, None], index

    def _lines_of(self, states: Tensor) -> tuple[Tensor, int] | None:
        """The lines of head_dim numbers to copy, in the order of the result; None where states are not made of such."""
        head_dim = states.shape[3]
        *strides, dense = states.stride()
        if states.device.type != "cpu" or dense != 1 or any(stride % head_dim for stride in strides):
            return None
        kind = (tuple(states.shape[:3]), tuple([stride // head_dim for stride in strides]))
        if self.found is None or self.found[0] != kind:
            frame, behind, count = _lines(*kind, self.tokens_per_frame, self.rest.start // self.tokens_per_frame)
            step = self.tokens_per_frame * kind[1][1]
            chosen = torch.add(frame, self.index.unsqueeze(-1), alpha=step).flatten(2)
            self.found = kind, torch.cat([chosen, behind], 2).flatten(), count
        return self.found[1:]

    def of(self, states: Tensor) -> Tensor:
        """[B, n*N + rest, H, D], a view of [B, H, n*N + rest, D]."""
        if self.rest is not None and self.empty is None and states[:, self.rest.start :].numel() > SMALL:
            return self._in_one_pass(states)
        lines = None if self.rest is None else self._lines_of(states)
        if lines is not None:
            batch, _, heads, head_dim = states.shape
            numbers = states.as_strided((lines[1], head_dim), (head_dim, 1))
            chosen = numbers.index_select(0, lines[0]).view(batch, heads, -1, head_dim)
        else:
            chosen = self._frames(states)[self._at(self.index)].flatten(2, 3)
            if self.rest is not None:
                chosen = torch.cat([chosen, self.rest.of(states).transpose(1, 2)], 2)
        if self.empty is not None:
            chosen = chosen.masked_fill(self.empty.unsqueeze(-1), 0.0)
        return chosen.transpose(1, 2)

    def _in_one_pass(self, states: Tensor) -> Tensor:
        """Chosen frames and the rest, each number read and written once."""
        batch, _, heads, head_dim = states.shape
        rest, pieces = self.rest.of(states), []
        frames = states.unflatten(1, (-1, self.tokens_per_frame))
        for row in range(batch):
            for head in range(heads):
                chosen = self.numbers[(row * heads + head) % len(self.numbers)]
                pieces += [*(frames[row, frame, :, head] for frame in chosen), rest[row, :, head]]
        return torch.cat(pieces).view(batch, heads, -1, head_dim).transpose(1, 2)

    def add(self, total: Tensor, gradient: Tensor) -> None:
        """Unless no head has a frame twice, place by place: the sums have one order."""
        if self.rest is not None:
            chosen = gradient.shape[1] - (self.rest.stop - self.rest.start)
            self.rest.add(total, gradient[:, chosen:])
            gradient = gradient[:, :chosen]
        gradient = gradient.transpose(1, 2)
        if self.empty is not None:
            gradient = gradient.masked_fill(self.empty[..., : gradient.shape[2], None], 0.0)
        gradient = gradient.unflatten(2, (-1, self.tokens_per_frame))  # [B, H, n, N, D]
        frames, places = self._frames(total), self.index.shape[-1]
        for place in [slice(None)] if self.different else [slice(i, i + 1) for i in range(places)]:
            frames.index_put_(self._at(self.index[..., place]), gradient[:, :, place], accumulate=True)


Part = Range | Gathered


class Sums:
    """The gradient of all keys or values [B, L, H, D], to which parts add what they contribute; 0 where none does."""

    def __init__(self, like: Tensor, dtype: torch.dtype) -> None:
        self.total: Tensor | None = None
        self.shape, self.dtype, self.device = like.shape, dtype, like.device

    def add(self, part: Part, gradient: Tensor) -> None:
        if self.total is not None:
            part.add(self.total, gradient)
        elif isinstance(part, Range) and part.stop == self.shape[1]:  # the first part reaches to the end
            self.total = torch.empty(self.shape, dtype=self.dtype, device=self.device)
            self.total[:, : part.start] = 0
            self.total[:, part.start :] = gradient
        else:
            self.total = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
            part.add(self.total, gradient)

    def result(self, dtype: torch.dtype) -> Tensor:
        if self.total is None:
            return torch.zeros(self.shape, dtype=dtype, device=self.device)
        return self.total.to(dtype)


def _runs(row: list[int], tokens_per_frame: int, rest: Range) -> list[Range]:
    """Ranges of tokens: the frames of a row of the table, then the rest; neighbours are put together."""
    ranges: list[Range] = []
    for start, stop in [*((f * tokens_per_frame, (f + 1) * tokens_per_frame) for f in row if f >= 0), rest]:
        if start < stop and ranges and ranges[-1].stop == start:
            ranges[-1] = Range(ranges[-1].start, stop)
        elif start < stop:
            ranges.append(Range(start, stop))
    return ranges


def _parts(
    table: Tensor,
    rows: list[list[int]] | None,
    tokens_per_frame: int,
    rest: Range,
    query: Tensor,
) -> list[Part]:
    """What the heads see by table [B, H, n]; rows: its numbers, where they can be read."""
    if rows is not None and all(row == rows[0] for row in rows):
        ranges = _runs(rows[0], tokens_per_frame, rest)
        if len(ranges) <= RUNS:
            return ranges
    dtype = statistics_dtype(query.dtype)  # of the bias that hides empty places
    if rest.start == rest.stop:
        return [Gathered(table, rows, tokens_per_frame, dtype)] if table.shape[-1] else []
    if not table.shape[-1]:
        return [rest]
    small = table.shape[0] * table.shape[1] * (rest.stop - rest.start) * query.shape[3] <= SMALL
    # in half precision a second call of torch's kernel costs more than the copy
    if small or (query.dtype in HALF and rows is not None and not any(-1 in row for row in rows)):
        return [Gathered(table, rows, tokens_per_frame, dtype, rest)]
    return [Gathered(table, rows, tokens_per_frame, dtype), rest]


def shown(
    query: Tensor,
    frame_table: Tensor,
    tokens_per_frame: int,
    candidate_frames: int,
    tokens: int,
    query_block: int | None,
) -> list[tuple[slice, list[Part]]]:
    """For ranges of the queries [B, Lq, H, D] the parts of the `tokens` keys that they see.

    frame_table [B, H, n], or [B, H, blocks, n] with query_block. Neighbouring blocks of queries that see the same are
    one range. Raises ValueError for a number that is no candidate frame, on the CPU.
    """
    queries = query.shape[1]
    rest = Range(candidate_frames * tokens_per_frame, tokens)
    if query_block is None:
        frame_table, query_block = frame_table.unsqueeze(2), queries
    numbers = None  # [blocks][B*H, or 1][n]
    if frame_table.device.type == "cpu":
        same = frame_table.stride()[:2] == (0, 0)  # expanded: all heads share one row
        numbers = (frame_table[:1, :1] if same else frame_table).permute(2, 0, 1, 3).flatten(1, 2).tolist()
        _check(numbers, candidate_frames)
    found: list[tuple[slice, list[Part]]] = []
    for block, table in enumerate(frame_table.unbind(2)):
        stop = min((block + 1) * query_block, queries)
        if numbers is not None and block and numbers[block] == numbers[block - 1]:
            before, parts = found.pop()
            found.append((slice(before.start, stop), parts))
        else:
            rows = None if numbers is None else numbers[block]
            parts = _parts(table, rows, tokens_per_frame, rest, query)
            found.append((slice(block * query_block, stop), parts))
    return found


def _check(numbers: list[list[list[int]]], candidate_frames: int) -> None:
    frames = [frame for rows in numbers for row in rows for frame in row]
    if frames and (min(frames) < -1 or max(frames) >= candidate_frames):
        raise ValueError(
            f"frame_table holds {min(frames)} to {max(frames)}: each place must be -1 (empty) or the index of a "
            f"candidate frame, below candidate_frames = {candidate_frames}"
        )

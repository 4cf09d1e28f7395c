"""What the attention kernels share: which rows and tokens a tile has, and how it is loaded."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .integers import next_power_of_2
from .layouts import Layout

LOG2_E = 1.4426950408889634


@triton.jit
def load_rows(first, stride, count, ROWS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr):
    """[ROWS, D_PAD] from pointer `first`; 0 in rows from `count` on and in the padded channels."""
    row = tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, D_PAD)[None, :]
    inside = row < count
    if D_PAD != D:
        inside = inside & (channel < D)
    return tl.load(first + row * stride + channel, mask=inside, other=0.0)


@triton.jit
def row_offsets(first, stride, count, ROWS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr):
    """Offsets [ROWS, D_PAD] of the rows from number `first` on, and which of them are inside.

    Nothing here is the same for two tiles, or the compiler would keep it in registers across the loop over key tiles.
    """
    row = first + tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, D_PAD)[None, :]
    return row.to(tl.int64) * stride + channel, (row < first + count) & (channel < D)


@triton.jit
def store_rows(base, first, stride, count, x, ROWS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr):
    """x [ROWS, D_PAD] to the rows from number `first` on, but for those from `count` on and the padded channels."""
    offsets, inside = row_offsets(first, stride, count, ROWS, D, D_PAD)
    tl.store(base + offsets, x.to(base.dtype.element_ty), mask=inside)


@triton.jit
def query_rows(tile, queries, heads, query_block, blocks, BM: tl.constexpr):
    """batch row, head, block of queries, first query, number of queries of a tile; tiles are cut per block."""
    tiles_per_block = tl.cdiv(query_block, BM)
    block = tile // tiles_per_block
    head = block // blocks
    batch = head // heads
    first = block % blocks * query_block + tile % tiles_per_block * BM
    count = tl.minimum(block % blocks * query_block + query_block, queries) - first
    return batch, head % heads, block % blocks, first, count


@triton.jit
def chosen_tokens(unit, table_row, tokens_per_frame, candidate_frames, BN: tl.constexpr):
    """frame, first token in it and number of tokens of one tile of the chosen frames; an empty place has none."""
    tiles_per_frame = tl.cdiv(tokens_per_frame, BN)
    frame = tl.load(table_row + unit // tiles_per_frame)
    start = unit % tiles_per_frame * BN
    exists = (frame >= 0) & (frame < candidate_frames)
    return frame, start, tl.where(exists, tokens_per_frame - start, 0)


def head_kind(query: Tensor | Layout) -> str:
    """The suffix of the rows of the configuration table that serve a tensor of this format and head size."""
    head_dim = query.shape[3]
    size = "64" if head_dim <= 64 else "128" if head_dim <= 128 else "256"
    return f"float32_{size}" if query.dtype == torch.float32 else size


def rows_per_tile(config: configs.Config, query_block: int) -> tuple[int, int]:
    """Query rows per tile, no more than a block of queries needs, and warps, fewer where a tile is smaller."""
    most = config.blocks["BM"]
    rows = min(most, max(16, next_power_of_2(query_block)))
    return rows, config.warps if rows == most else min(config.warps, 4)


def head_sizes(query: Tensor | Layout) -> dict[str, object]:
    """The constexpr arguments that follow from the tensors: head size, padded head size, exact products for float32."""
    head_dim = query.shape[3]
    precision = "ieee" if query.dtype == torch.float32 else None
    return {"D": head_dim, "D_PAD": max(16, next_power_of_2(head_dim)), "PRECISION": precision}

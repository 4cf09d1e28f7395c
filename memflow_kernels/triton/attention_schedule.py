"""How tiles of queries fill the chip: the tiles left over after whole rounds are cut in pieces and put together again.

One program per tile, one tile after the other: where every multiprocessor works on a tile, the last round would leave
many of them idle (444 tiles on 132 of them: 3.36 rounds take the time of 4). So the key tiles ("units") of the tiles
left over are divided among several programs, which write a partial result each.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl

from .attention_tiles import query_rows, row_offsets, store_rows

MOST_PIECES = 32
START = 2  # what a program costs before and after its loop over keys, in units
COMBINING = 0.5  # what each piece adds to the kernel that puts tiles together, in units


@functools.cache
def schedule(tiles: int, units: int, side_by_side: int) -> tuple[int, int]:
    """Number of tiles that one program works on alone, and number of pieces of each tile beyond."""
    left = tiles % side_by_side

    def time(pieces: int) -> float:
        rounds = -(-left * pieces // side_by_side)
        return rounds * units if pieces == 1 else rounds * (-(-units // pieces) + START) + pieces * COMBINING

    pieces = min(range(1, min(MOST_PIECES, units) + 1), key=time)
    return (tiles, 1) if pieces == 1 else (tiles - left, pieces)


@triton.jit
def share_of_program(program, whole, pieces, units):
    """tile and range of units of a program; programs from `whole` on have one piece of a tile."""
    piece = program - whole
    part = piece % pieces
    tile = tl.where(program < whole, program, whole + piece // pieces)
    first = tl.where(program < whole, 0, part * units // pieces)
    last = tl.where(program < whole, units, (part + 1) * units // pieces)
    return tile, first, last


@triton.jit(do_not_specialize=["queries", "heads", "query_block", "blocks", "whole", "pieces"])
def combine_kernel(
    partial_out, partial_lse, out, lse, queries, heads, query_block, blocks, whole, pieces,
    D: tl.constexpr, D_PAD: tl.constexpr, BM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Weighs the pieces of one tile by their mass, always in the same order; grid (tiles in pieces, BM / ROWS).

    partial_out [programs, BM, D], normalised; partial_lse [programs, BM], to the base 2.
    """
    index, first = tl.program_id(0), tl.program_id(1) * ROWS
    batch, head, _, first_row, rows = query_rows(whole + index, queries, heads, query_block, blocks, BM)
    row = tl.arange(0, ROWS)
    inside_row = first + row < rows
    acc = tl.zeros([ROWS, D_PAD], tl.float32)
    top = tl.full([ROWS], -3.0e38, tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    for piece in tl.range(0, pieces):
        slot = (index * pieces + piece) * BM + first
        part_lse = tl.load(partial_lse + slot + row, mask=inside_row, other=float("-inf"))
        offsets, inside = row_offsets(slot, D, rows - first, ROWS, D, D_PAD)
        part = tl.load(partial_out + offsets, mask=inside, other=0.0)
        new_top = tl.maximum(top, part_lse)
        shrink, weight = tl.exp2(top - new_top), tl.exp2(part_lse - new_top)
        acc = acc * shrink[:, None] + part * weight[:, None]
        mass = mass * shrink + weight
        top = new_top
    some = tl.where(mass == 0, 1.0, mass)
    batch, head, first_row = batch.to(tl.int64), head.to(tl.int64), first_row + first
    base = out + (batch * queries * heads + head) * D
    store_rows(base, first_row, heads * D, rows - first, acc / some[:, None], ROWS, D, D_PAD)
    log_mass = tl.where(mass == 0, float("-inf"), top + tl.log2(some)) * 0.6931471805599453
    tl.store(lse + (batch * heads + head) * queries + first_row + row, log_mass, mask=inside_row)

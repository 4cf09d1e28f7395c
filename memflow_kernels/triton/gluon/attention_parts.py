"""What the attention kernels of all chips share: which tiles a program has, their loads, one softmax, the result."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ..attention_schedule import share_of_program
from ..attention_tiles import query_rows
from .names import load_tile


@gluon.jit
def work_of_program(
    frame_table, queries, heads, query_block, blocks, places, tokens_per_frame, candidate_frames, tokens, whole, pieces,
    BM: gl.constexpr, BN: gl.constexpr, PLACES_PAD: gl.constexpr,
):  # fmt: skip
    """Which queries this program has, and which tiles of keys: first .. last, after those of `table_units` the rest.

    left is the number of tokens from the first tile to the end of its frame, or of all; rest that behind the
    candidates; slot that of the partial result, -1 for a whole tile of queries. Empty places have no tiles, and a
    program without any has one behind the end of the keys, which adds nothing.
    """
    program = gl.program_id(0)
    tile, _, _ = share_of_program(program, whole, pieces, 0)
    batch, head, block, first_row, rows = query_rows(tile, queries, heads, query_block, blocks, BM)
    table_row = frame_table + ((batch.to(gl.int64) * heads + head) * blocks + block) * places
    place = gl.arange(0, PLACES_PAD, layout=gl.BlockedLayout([1], [32], [4], [0]))
    frames = gl.load(table_row + place, mask=place < places, other=-1)
    filled = gl.sum(((frames >= 0) & (frames < candidate_frames)).to(gl.int32), 0)
    per_frame = gl.cdiv(tokens_per_frame, BN)
    table_units = filled * per_frame
    rest = tokens - candidate_frames * tokens_per_frame
    units = table_units + gl.cdiv(rest, BN)
    _, first, last = share_of_program(program, whole, pieces, units)
    if first >= last:
        first = units
        last = units + 1
    left = rest - (first - table_units) * BN
    if first < table_units:
        left = tokens_per_frame - first % per_frame * BN
    slot = gl.where(program < whole, -1, program - whole)
    return (batch, head, first_row, rows, slot), table_row, (first, last, table_units, rest), left


@gluon.jit
def fetch(
    by_frame, by_token, tiles, loaded, read, batch, head, table_row, tokens_per_frame, candidate_frames, places,
    first, last, BN: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """Tiles first .. last of keys or of values, each as soon as its place is free again. Empty places have none."""
    BYTES: gl.constexpr = BN * D * 2
    per_frame = gl.cdiv(tokens_per_frame, BN)
    stage = 0
    parity = 1  # of the round of the ring before
    before = 0  # tiles of the frames so far
    for place in range(places):
        frame = gl.load(table_row + place)
        if (frame >= 0) & (frame < candidate_frames):
            for unit in range(gl.maximum(first, before), gl.minimum(last, before + per_frame)):
                mbarrier.wait(read.index(stage), parity)
                mbarrier.expect(loaded.index(stage), BYTES)
                at = [batch, head, frame, (unit - before) * BN, 0]
                load_tile(by_frame, at, loaded.index(stage), tiles.index(stage).reshape([1, 1, 1, BN, D]))
                stage, parity = next_stage(stage, parity, STAGES)
            before += per_frame
    for unit in range(gl.maximum(first, before), last):
        mbarrier.wait(read.index(stage), parity)
        mbarrier.expect(loaded.index(stage), BYTES)
        at = [batch, head, candidate_frames * tokens_per_frame + (unit - before) * BN, 0]
        load_tile(by_token, at, loaded.index(stage), tiles.index(stage).reshape([1, 1, BN, D]))
        stage, parity = next_stage(stage, parity, STAGES)


@gluon.jit
def next_stage(stage, parity, STAGES: gl.constexpr):
    """The stage behind one of a ring, and the parity of the round that it is in."""
    stage = gl.where(stage == STAGES - 1, 0, stage + 1)
    return stage, gl.where(stage == 0, parity ^ 1, parity)


@gluon.jit
def next_left(left, unit, table_units, tokens_per_frame, rest, BN: gl.constexpr):
    """How many tokens are left at tile `unit`, from what was left at the tile before."""
    left -= BN
    if left <= 0:  # the next frame, or what comes behind the candidates
        left = gl.where(unit < table_units, tokens_per_frame, rest)
    return left


@gluon.jit
def softmax(logits, top, mass, scale, left, BN: gl.constexpr, LOGITS: gl.constexpr):
    """Shares of one more tile, of which the first `left` keys exist; top is the largest logit so far, to the base 2.

    The products are written as fused ones: they are what the loop has most of.
    """
    if left < BN:  # a branch: most tiles are full and need no masking
        key = gl.arange(0, BN, layout=gl.SliceLayout(0, LOGITS))
        logits = gl.where((key < left)[None, :], logits, float("-inf"))
    new_top = gl.maximum(top, gl.max(logits, 1) * scale)
    share = gl.exp2(gl.fma(logits, scale, -new_top[:, None]))
    shrink = gl.exp2(top - new_top)
    mass = gl.fma(mass, shrink, gl.sum(share, 1))
    return share, new_top, mass, shrink


@gluon.jit
def write_result(
    acc, top, mass, results, place_of, queries, heads,
    GROUP: gl.constexpr, ROWS: gl.constexpr, D: gl.constexpr, LOGITS: gl.constexpr, SUMS: gl.constexpr,
):  # fmt: skip
    """The queries of one group of warps to out and lse, or to the partial results, normalised."""
    ROW: gl.constexpr = gl.SliceLayout(1, LOGITS)
    ROW_OF_SUMS: gl.constexpr = gl.SliceLayout(1, SUMS)
    some = gl.where(mass == 0, 1.0, mass)
    acc = acc * gl.convert_layout(1.0 / some, ROW_OF_SUMS)[:, None]
    log_mass = gl.where(mass == 0, float("-inf"), top + gl.log2(some))
    out, lse, partial_out, partial_lse = results
    batch, head, first_row, rows, slot = place_of
    row = GROUP * ROWS + gl.arange(0, ROWS, layout=ROW_OF_SUMS)
    row_of_lse = GROUP * ROWS + gl.arange(0, ROWS, layout=ROW)
    channel = gl.arange(0, D, layout=gl.SliceLayout(0, SUMS))
    if slot < 0:
        token = (batch.to(gl.int64) * queries + first_row + row) * heads + head
        gl.store(out + token[:, None] * D + channel[None, :], acc.to(out.dtype.element_ty), mask=(row < rows)[:, None])
        number = (batch.to(gl.int64) * heads + head) * queries + first_row + row_of_lse
        gl.store(lse + number, log_mass * 0.6931471805599453, mask=row_of_lse < rows)
    else:
        part = slot.to(gl.int64) * (2 * ROWS)
        gl.store(partial_out + (part + row)[:, None] * D + channel[None, :], acc, mask=(row < rows)[:, None])
        gl.store(partial_lse + part + row_of_lse, log_mass, mask=row_of_lse < rows)

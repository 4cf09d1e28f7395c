"""memory_attention on Hopper: one warp fetches tiles of keys, one those of values, two groups of four warps multiply.

Each group has 64 queries. While it works out the softmax of one tile of keys, its product of shares and values of the
tile before is in flight, and so are the products of the other group: the two take turns in giving out work to the
tensor cores, so that one has its softmax while the other multiplies. Tiles lie in two rings of stages, each stage with
a barrier for "loaded" and one for "read": keys are needed one tile earlier than values and make room one tile earlier.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..attention_schedule import share_of_program
from ..attention_tiles import query_rows
from .names import barriers, load_tile

ROWS = gl.constexpr(64)  # queries of one group of four warps: the height of one tensor-core product


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
                stage = gl.where(stage == STAGES - 1, 0, stage + 1)
                parity = gl.where(stage == 0, parity ^ 1, parity)
            before += per_frame
    for unit in range(gl.maximum(first, before), last):
        mbarrier.wait(read.index(stage), parity)
        mbarrier.expect(loaded.index(stage), BYTES)
        at = [batch, head, candidate_frames * tokens_per_frame + (unit - before) * BN, 0]
        load_tile(by_token, at, loaded.index(stage), tiles.index(stage).reshape([1, 1, BN, D]))
        stage = gl.where(stage == STAGES - 1, 0, stage + 1)
        parity = gl.where(stage == 0, parity ^ 1, parity)


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
def consumer(
    GROUP: gl.constexpr, tiles, loaded, read, my_turn, their_turn, results, scale, place_of, sizes, left,
    tokens_per_frame, rest, table_units, first, last,
    BN: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """The ROWS queries of one group over all tiles of this program; writes their result."""
    q_tiles, k_tiles, v_tiles = tiles
    q_loaded, k_loaded, v_loaded = loaded
    k_read, v_read = read
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, LOGITS)
    ROW_OF_SUMS: gl.constexpr = gl.SliceLayout(1, SUMS)
    SHARES: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    top = gl.full([ROWS], -3.0e38, gl.float32, layout=ROW)  # finite, so that a row without a key meets no inf - inf
    mass = gl.zeros([ROWS], gl.float32, layout=ROW)
    acc = gl.zeros([ROWS, D], gl.float32, layout=SUMS)
    zero = gl.zeros([ROWS, BN], gl.float32, layout=LOGITS)
    q = q_tiles.index(GROUP).reshape([ROWS, D])
    stage = 0
    parity = 0
    mbarrier.wait(q_loaded, 0)
    mbarrier.wait(k_loaded.index(0), 0)
    logits = warpgroup_mma(q, k_tiles.index(0).permute((1, 0)), zero, use_acc=False)
    mbarrier.arrive(k_read.index(0))
    share, top, mass, shrink = softmax(logits, top, mass, scale, left, BN, LOGITS)
    shares = gl.convert_layout(share.to(v_tiles.dtype), SHARES)
    mbarrier.wait(v_loaded.index(0), 0)
    for unit in range(first + 1, last):
        stage_before = stage
        stage = gl.where(stage == STAGES - 1, 0, stage + 1)
        parity = gl.where(stage == 0, parity ^ 1, parity)
        left -= BN
        if left <= 0:  # the next frame, or what comes behind the candidates
            left = gl.where(unit < table_units, tokens_per_frame, rest)
        mbarrier.wait(k_loaded.index(stage), parity)
        mbarrier.wait(my_turn, (unit - first & 1) ^ GROUP)
        k = k_tiles.index(stage).permute((1, 0))
        logits_coming = warpgroup_mma(q, k, zero, use_acc=False, is_async=True)
        acc_coming = warpgroup_mma(shares, v_tiles.index(stage_before), acc, is_async=True)
        mbarrier.arrive(their_turn)
        logits = warpgroup_mma_wait(1, deps=[logits_coming])
        mbarrier.arrive(k_read.index(stage))
        share, top, mass, shrink = softmax(logits, top, mass, scale, left, BN, LOGITS)
        mbarrier.wait(v_loaded.index(stage), parity)
        acc = warpgroup_mma_wait(0, deps=[acc_coming])
        mbarrier.arrive(v_read.index(stage_before))
        acc = acc * gl.convert_layout(shrink, ROW_OF_SUMS)[:, None]
        shares = gl.convert_layout(share.to(v_tiles.dtype), SHARES)
    acc = warpgroup_mma(shares, v_tiles.index(stage), acc)

    some = gl.where(mass == 0, 1.0, mass)
    acc = acc * gl.convert_layout(1.0 / some, ROW_OF_SUMS)[:, None]
    log_mass = gl.where(mass == 0, float("-inf"), top + gl.log2(some))
    out, lse, partial_out, partial_lse = results
    batch, head, first_row, rows, slot = place_of
    queries, heads = sizes
    row = GROUP * ROWS + gl.arange(0, ROWS, layout=ROW_OF_SUMS)
    row_of_lse = GROUP * ROWS + gl.arange(0, ROWS, layout=ROW)
    channel = gl.arange(0, D, layout=gl.SliceLayout(0, SUMS))
    if slot < 0:  # a whole tile
        token = (batch.to(gl.int64) * queries + first_row + row) * heads + head
        gl.store(out + token[:, None] * D + channel[None, :], acc.to(out.dtype.element_ty), mask=(row < rows)[:, None])
        number = (batch.to(gl.int64) * heads + head) * queries + first_row + row_of_lse
        gl.store(lse + number, log_mass * 0.6931471805599453, mask=row_of_lse < rows)
    else:
        part = slot.to(gl.int64) * (2 * ROWS)
        gl.store(partial_out + (part + row)[:, None] * D + channel[None, :], acc, mask=(row < rows)[:, None])
        gl.store(partial_lse + part + row_of_lse, log_mass, mask=row_of_lse < rows)


@gluon.jit(
    do_not_specialize=[
        "queries", "heads", "query_block", "blocks", "places", "tokens_per_frame", "candidate_frames", "tokens",
        "whole", "pieces",
    ]
)  # fmt: skip
def forward_sm90_kernel(
    query, key_frames, value_frames, key_rest, value_rest, frame_table, out, lse, partial_out, partial_lse,
    scale, queries, heads, query_block, blocks, places, tokens_per_frame, candidate_frames, tokens, whole, pieces,
    D: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, PLACES_PAD: gl.constexpr,
):  # fmt: skip
    """Writes out [B, Lq, H, D] and lse [B, H, Lq] of a whole tile, or partial_* of a piece of one.

    scale is positive and times log2(e). Empty places have no tiles, and a program without any has one of no key.
    """
    program = gl.program_id(0)
    tile, _, _ = share_of_program(program, whole, pieces, 0)
    batch, head, block, first_row, rows = query_rows(tile, queries, heads, query_block, blocks, 2 * ROWS)
    table_row = frame_table + ((batch.to(gl.int64) * heads + head) * blocks + block) * places
    place = gl.arange(0, PLACES_PAD, layout=gl.BlockedLayout([1], [32], [4], [0]))
    frames = gl.load(table_row + place, mask=place < places, other=-1)
    filled = gl.sum(((frames >= 0) & (frames < candidate_frames)).to(gl.int32), 0)
    per_frame = gl.cdiv(tokens_per_frame, BN)
    table_units = filled * per_frame
    rest = tokens - candidate_frames * tokens_per_frame
    units = table_units + gl.cdiv(rest, BN)
    _, first, last = share_of_program(program, whole, pieces, units)
    if first >= last:  # behind the end of the keys, so that it adds nothing
        first = units
        last = units + 1
    left = rest - (first - table_units) * BN
    if first < table_units:
        left = tokens_per_frame - first % per_frame * BN
    slot = gl.where(program < whole, -1, program - whole)

    dtype: gl.constexpr = query.dtype
    TILE: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    q_tiles = gl.allocate_shared_memory(dtype, [2, 1, 1, ROWS, D], query.layout)
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, BN, D], TILE)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, BN, D], TILE)
    q_loaded = barriers(1).index(0)
    k_loaded = barriers(STAGES)
    v_loaded = barriers(STAGES)
    k_read = barriers(STAGES)
    v_read = barriers(STAGES)
    turns = barriers(2)
    mbarrier.init(q_loaded, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_loaded.index(i), count=1)
        mbarrier.init(v_loaded.index(i), count=1)
        mbarrier.init(k_read.index(i), count=2)
        mbarrier.init(v_read.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(turns.index(i), count=1)
    fence_async_shared()
    mbarrier.expect(q_loaded, 2 * ROWS * D * 2)
    load_tile(query, [batch, head, first_row, 0], q_loaded, q_tiles.index(0))
    load_tile(query, [batch, head, first_row + ROWS, 0], q_loaded, q_tiles.index(1))

    tiles = (q_tiles, k_tiles, v_tiles)
    loaded = (q_loaded, k_loaded, v_loaded)
    read = (k_read, v_read)
    results = (out, lse, partial_out, partial_lse)
    place_of = (batch, head, first_row, rows, slot)
    sizes = (queries, heads)
    gl.warp_specialize(
        [
            (consumer, (
                0, tiles, loaded, read, turns.index(0), turns.index(1), results, scale, place_of, sizes, left,
                tokens_per_frame, rest, table_units, first, last, BN, STAGES, D,
            )),
            (consumer, (
                1, tiles, loaded, read, turns.index(1), turns.index(0), results, scale, place_of, sizes, left,
                tokens_per_frame, rest, table_units, first, last, BN, STAGES, D,
            )),
            (fetch, (
                key_frames, key_rest, k_tiles, k_loaded, k_read, batch, head, table_row, tokens_per_frame,
                candidate_frames, places, first, last, BN, STAGES, D,
            )),
            (fetch, (
                value_frames, value_rest, v_tiles, v_loaded, v_read, batch, head, table_row, tokens_per_frame,
                candidate_frames, places, first, last, BN, STAGES, D,
            )),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )  # fmt: skip

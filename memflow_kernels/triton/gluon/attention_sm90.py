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

from .attention_parts import fetch, next_left, next_stage, softmax, work_of_program, write_result
from .names import barriers, load_tile

ROWS = gl.constexpr(64)  # queries of one group of four warps: the height of one tensor-core product


@gluon.jit
def attend(
    GROUP: gl.constexpr, tiles, loaded, read, my_turn, their_turn, results, place_of, queries, heads,
    scale, work, left, tokens_per_frame, BN: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """The ROWS queries of one group over all tiles of this program; writes their result."""
    q_tiles, k_tiles, v_tiles = tiles
    q_loaded, k_loaded, v_loaded = loaded
    k_read, v_read = read
    first, last, table_units, rest = work
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, LOGITS)
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
        stage, parity = next_stage(stage, parity, STAGES)
        left = next_left(left, unit, table_units, tokens_per_frame, rest, BN)
        mbarrier.wait(k_loaded.index(stage), parity)
        mbarrier.wait(my_turn, (unit - first & 1) ^ GROUP)
        k = k_tiles.index(stage).permute((1, 0))
        logits_coming = warpgroup_mma(q, k, zero, use_acc=False, is_async=True)
        acc_coming = warpgroup_mma(shares, v_tiles.index(stage_before), acc, is_async=True)
        mbarrier.arrive(their_turn)
        logits = warpgroup_mma_wait(1, deps=[logits_coming])
        mbarrier.arrive(k_read.index(stage))
        share, top, mass, shrink = softmax(logits, top, mass, scale, left, BN, LOGITS)
        # here, not where the next tile needs it: ptxas moves the wait for a product up, but not past another wait
        mbarrier.wait(v_loaded.index(stage), parity)
        acc = warpgroup_mma_wait(0, deps=[acc_coming])
        mbarrier.arrive(v_read.index(stage_before))
        acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, SUMS))[:, None]
        shares = gl.convert_layout(share.to(v_tiles.dtype), SHARES)
    acc = warpgroup_mma(shares, v_tiles.index(stage), acc)
    write_result(acc, top, mass, results, place_of, queries, heads, GROUP, ROWS, D, LOGITS, SUMS)


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
    """Writes out [B, Lq, H, D] and lse [B, H, Lq] of a whole tile of 2 x ROWS queries, or partial_* of a piece of one.

    scale is positive and times log2(e).
    """
    place_of, table_row, work, left = work_of_program(
        frame_table, queries, heads, query_block, blocks, places, tokens_per_frame, candidate_frames, tokens, whole,
        pieces, 2 * ROWS, BN, PLACES_PAD,
    )  # fmt: skip
    batch, head, first_row, _, _ = place_of
    first, last, _, _ = work

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
    gl.warp_specialize(
        [
            (attend, (
                0, tiles, loaded, read, turns.index(0), turns.index(1), results, place_of, queries, heads,
                scale, work, left, tokens_per_frame, BN, STAGES, D,
            )),
            (attend, (
                1, tiles, loaded, read, turns.index(1), turns.index(0), results, place_of, queries, heads,
                scale, work, left, tokens_per_frame, BN, STAGES, D,
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

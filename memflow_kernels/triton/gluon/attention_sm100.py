"""memory_attention on Blackwell: one warp gives out all products, two groups of four warps have a softmax each.

A group has 128 queries, one per thread. Logits and sums lie in tensor memory. While one group works out its shares, the
products of the other run: shares and values of one tile, then queries and keys of the next, group by group. Shares take
the place of the left half of the logits that they come from; the products of one warp run in the order in which they
are given out, so that those of the next logits do not meet them.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.blackwell import (
    TensorMemoryLayout,
    allocate_tensor_memory,
    fence_async_shared,
    mbarrier,
    tcgen05_commit,
    tcgen05_mma,
)

from .attention_parts import fetch, next_left, next_stage, softmax, work_of_program, write_result
from .names import barriers, first_half, load_tile

ROWS = gl.constexpr(128)  # queries of one group of four warps: the height of one tensor-core product


@gluon.jit
def multiply(
    q_tiles, k_tiles, v_tiles, logits, sums, loaded, read, logits_ready, shares_ready, first, last,
    BN: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """All products of a program. After the last, the barrier of the logits says that the sums are complete."""
    q_loaded, k_loaded, v_loaded = loaded
    k_read, v_read = read
    mbarrier.wait(q_loaded, 0)
    mbarrier.wait(k_loaded.index(0), 0)
    for group in gl.static_range(2):
        tcgen05_mma(
            q_tiles.index(group).reshape([ROWS, D]), k_tiles.index(0).permute((1, 0)), logits.index(group),
            use_acc=False, mbarriers=[logits_ready.index(group), k_read.index(0)],
        )  # fmt: skip
    stage = 0
    parity = 0
    for unit in range(first, last):
        stage_before = stage
        mbarrier.wait(v_loaded.index(stage), parity)
        stage, parity = next_stage(stage, parity, STAGES)
        for group in gl.static_range(2):
            mbarrier.wait(shares_ready.index(group), unit - first & 1)
            tcgen05_mma(
                first_half(logits.index(group), v_tiles.dtype, ROWS, BN), v_tiles.index(stage_before),
                sums.index(group), use_acc=unit > first, mbarriers=[v_read.index(stage_before)],
            )  # fmt: skip
            if unit + 1 < last:
                mbarrier.wait(k_loaded.index(stage), parity)
                tcgen05_mma(
                    q_tiles.index(group).reshape([ROWS, D]), k_tiles.index(stage).permute((1, 0)), logits.index(group),
                    use_acc=False, mbarriers=[logits_ready.index(group), k_read.index(stage)],
                )  # fmt: skip
            else:
                tcgen05_commit(logits_ready.index(group))


@gluon.jit
def weigh(
    GROUP: gl.constexpr, logits_tile, sums_tile, ready, weighed, results, place_of, queries, heads,
    scale, work, left, tokens_per_frame, dtype: gl.constexpr, BN: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """Softmax of the ROWS queries of one group over all tiles of this program; writes their result."""
    first, last, table_units, rest = work
    LOGITS: gl.constexpr = gl.BlockedLayout([1, BN], [32, 1], [4, 1], [0, 1])
    SUMS: gl.constexpr = gl.BlockedLayout([1, D], [32, 1], [4, 1], [0, 1])
    ROW: gl.constexpr = gl.SliceLayout(1, LOGITS)
    top = gl.full([ROWS], -3.0e38, gl.float32, layout=ROW)  # finite, so that a row without a key meets no inf - inf
    mass = gl.zeros([ROWS], gl.float32, layout=ROW)
    shares_tile = first_half(logits_tile, dtype, ROWS, BN)
    for unit in range(first, last):
        mbarrier.wait(ready, unit - first & 1)
        share, top, mass, shrink = softmax(logits_tile.load(LOGITS), top, mass, scale, left, BN, LOGITS)
        shares_tile.store(share.to(dtype))
        if unit > first:  # the products before this tile's logits are complete, the sums among them
            factor = gl.convert_layout(shrink, gl.SliceLayout(1, SUMS))
            sums_tile.store(sums_tile.load(SUMS) * factor[:, None])
        mbarrier.arrive(weighed)
        left = next_left(left, unit + 1, table_units, tokens_per_frame, rest, BN)
    mbarrier.wait(ready, last - first & 1)
    write_result(sums_tile.load(SUMS), top, mass, results, place_of, queries, heads, GROUP, ROWS, D, LOGITS, SUMS)


@gluon.jit(
    do_not_specialize=[
        "queries", "heads", "query_block", "blocks", "places", "tokens_per_frame", "candidate_frames", "tokens",
        "whole", "pieces",
    ]
)  # fmt: skip
def forward_sm100_kernel(
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
    logits = allocate_tensor_memory(gl.float32, [2, ROWS, BN], TensorMemoryLayout((ROWS, BN), col_stride=1))
    sums = allocate_tensor_memory(gl.float32, [2, ROWS, D], TensorMemoryLayout((ROWS, D), col_stride=1))
    q_loaded = barriers(1).index(0)
    k_loaded = barriers(STAGES)
    v_loaded = barriers(STAGES)
    k_read = barriers(STAGES)
    v_read = barriers(STAGES)
    logits_ready = barriers(2)
    shares_ready = barriers(2)
    mbarrier.init(q_loaded, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_loaded.index(i), count=1)
        mbarrier.init(v_loaded.index(i), count=1)
        mbarrier.init(k_read.index(i), count=2)
        mbarrier.init(v_read.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(logits_ready.index(i), count=1)
        mbarrier.init(shares_ready.index(i), count=1)
    fence_async_shared()
    mbarrier.expect(q_loaded, 2 * ROWS * D * 2)
    load_tile(query, [batch, head, first_row, 0], q_loaded, q_tiles.index(0))
    load_tile(query, [batch, head, first_row + ROWS, 0], q_loaded, q_tiles.index(1))

    loaded = (q_loaded, k_loaded, v_loaded)
    read = (k_read, v_read)
    results = (out, lse, partial_out, partial_lse)
    gl.warp_specialize(
        [
            (weigh, (
                0, logits.index(0), sums.index(0), logits_ready.index(0), shares_ready.index(0), results, place_of,
                queries, heads, scale, work, left, tokens_per_frame, dtype, BN, D,
            )),
            (weigh, (
                1, logits.index(1), sums.index(1), logits_ready.index(1), shares_ready.index(1), results, place_of,
                queries, heads, scale, work, left, tokens_per_frame, dtype, BN, D,
            )),
            (multiply, (
                q_tiles, k_tiles, v_tiles, logits, sums, loaded, read, logits_ready, shares_ready, first, last,
                BN, STAGES, D,
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
        [4, 1, 1, 1],
        [240, 24, 24, 24],
    )  # fmt: skip

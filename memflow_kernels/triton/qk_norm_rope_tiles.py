"""The kernel of qk_norm_rope and qk_norm_rope_write, and what it shares with the backward.

A token is held in PIECES tiles of BLOCK_HEADS heads each, so that no lane is idle where the number of heads is no power
of two, and where BLOCK_HEADS * BLOCK_DIM is what a warp loads at 16 bytes per thread, a token stays within one warp: no
barrier, and the turns of a channel pair, which are the same for all heads, are worked out once for all pieces.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .pairs import widened
from .rotary import axis_speeds, rotate, turns_of_phase


@triton.jit
def inverse_rms(squares, channels, eps):
    """squares [BLOCK_TOKENS, BLOCK_HEADS, BLOCK_DIM] float32 -> 1 / sqrt(their sum / channels + eps), per token."""
    mean_square = tl.div_rn(tl.sum(tl.sum(squares, 2), 1), channels * 1.0)
    return tl.div_rn(1.0, tl.sqrt_rn(mean_square + eps))[:, None, None]


@triton.jit
def first_number(start_frame, start):
    """Number of the first frame, int64: start_frame, plus what `start` points to."""
    first = tl.cast(start_frame, tl.int64)
    if start is not None:
        first += tl.load(start).to(tl.int64)
    return first


@triton.jit
def load_pieces(pointers, step, width, heads, dims, BLOCK_HEADS: tl.constexpr, PIECES: tl.constexpr):
    """PIECES tiles of BLOCK_HEADS heads, `step` apart from head to head; 0 from head number `heads` on."""
    tiles = ()
    for piece in tl.static_range(PIECES):
        inside = (width + piece * BLOCK_HEADS < heads) & dims
        tiles += (tl.load(pointers + piece * BLOCK_HEADS * step, inside, other=0.0),)
    return tiles


@triton.jit
def store_pieces(pointers, step, tiles, width, heads, dims, BLOCK_HEADS: tl.constexpr, PIECES: tl.constexpr):
    """What load_pieces would load."""
    for piece in tl.static_range(PIECES):
        inside = (width + piece * BLOCK_HEADS < heads) & dims
        tl.store(pointers + piece * BLOCK_HEADS * step, tiles[piece], inside)


@triton.jit
def zero_pieces(SHAPE: tl.constexpr, PIECES: tl.constexpr):
    tiles = ()
    for _ in tl.static_range(PIECES):
        tiles += (tl.zeros(SHAPE, tl.float32),)
    return tiles


@triton.jit
def add_pieces(totals, tiles, PIECES: tl.constexpr, NVIDIA: tl.constexpr):
    sums = ()
    for piece in tl.static_range(PIECES):
        sums += (totals[piece] + widened(tiles[piece], NVIDIA),)
    return sums


@triton.jit
def store_sums(
    target, totals, heads, head_dim,
    LANE: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_DIM: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Pieces [BLOCK_TOKENS, BLOCK_HEADS, BLOCK_DIM], summed over the tokens, to one row of [H, D] numbers of 4 bytes.

    A lane that loads LANE numbers of 2 bytes at once has to store them as two times LANE / 2 numbers of 4. Stored in
    one go, the compiler would spread them over other lanes, and so the whole arithmetic before: done twice.
    """
    for piece in tl.static_range(PIECES):
        total = tl.sum(totals[piece], 0)
        head = tl.arange(0, BLOCK_HEADS) + piece * BLOCK_HEADS
        if LANE == 0:
            dim = tl.arange(0, BLOCK_DIM)[None, :]
            head = head[:, None]
            tl.store(target + head * head_dim + dim, total, (head < heads) & (dim < head_dim))
        else:
            halves = total.reshape(BLOCK_HEADS, BLOCK_DIM // LANE, 2, LANE // 2).permute(0, 1, 3, 2)
            low, high = tl.split(halves)
            dim = tl.arange(0, BLOCK_DIM // LANE)[None, :, None] * LANE + tl.arange(0, LANE // 2)[None, None, :]
            head = head[:, None, None]
            at = target + head * head_dim + dim
            tl.store(at, low, (head < heads) & (dim < head_dim))
            tl.store(at + LANE // 2, high, (head < heads) & (dim + LANE // 2 < head_dim))


@triton.jit
def norm_rotate(raw, weights, tokens_inside, channels, eps, cos, sin, PIECES: tl.constexpr):
    """Tokens, in pieces, normed, weighted and turned; each step rounds to their dtype. 0 where not tokens_inside.

    weights: None for tokens that are normed already.
    """
    turned = ()
    if weights is None:
        for piece in tl.static_range(PIECES):
            turned += (rotate(raw[piece].to(tl.float32), cos, sin).to(raw[piece].dtype),)
    else:
        first = raw[0].to(tl.float32)
        squares = first * first
        for piece in tl.static_range(1, PIECES):
            wide = raw[piece].to(tl.float32)
            squares = tl.fma(wide, wide, squares)
        inverse = tl.where(tokens_inside, inverse_rms(squares, channels, eps), 0.0)
        for piece in tl.static_range(PIECES):
            normed = (raw[piece].to(tl.float32) * inverse).to(raw[piece].dtype).to(tl.float32)
            weighted = (normed * weights[piece].to(tl.float32)).to(raw[piece].dtype).to(tl.float32)
            turned += (rotate(weighted, cos, sin).to(raw[piece].dtype),)
    return turned


@triton.jit(do_not_specialize=["start_frame", "tokens", "heads", "rows", "cols", "places"])
def norm_rope_kernel(
    query, key, value,  # [B, L, H, D]; value None: nothing goes to a pool
    weight_q, weight_k,  # [H*D]; None: query and key are normed already
    new_query,  # [B, L, H, D], contiguous
    new_key,  # [B, L, H, D], contiguous; with a pool: its key
    pool_value,
    key_sums,  # [B, frames * runs, H, D] float32, contiguous: sums of the new keys over each run of tokens
    query_sums,  # the same of the new queries; None: not wanted
    slots,  # [frames] int32
    start,  # one integer or None
    query_batch, query_token, query_head,
    key_batch, key_token, key_head,
    value_batch, value_token, value_head,
    new_key_batch, new_key_token, new_key_head,
    pool_value_batch, pool_value_token, pool_value_head,
    tokens, heads, head_dim, rows, cols, start_frame, places, eps,
    RUN: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PIECES: tl.constexpr,
    LANE: tl.constexpr,
    NVIDIA: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One program: up to RUN tokens of one frame of one batch row, BLOCK_TOKENS of them at a time."""
    run, frame, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    per_frame = rows * cols
    channels = heads * head_dim
    head, dim = tl.arange(0, BLOCK_HEADS)[None, :, None], tl.arange(0, BLOCK_DIM)[None, None, :]
    dims = dim < head_dim
    # once for every token of a tile, so that a lane gets the weights of its own numbers
    channel = head * head_dim + dim + tl.zeros([BLOCK_TOKENS, 1, 1], tl.int32)
    weights_q, weights_k = None, None
    if weight_q is not None:
        weights_q = load_pieces(weight_q + channel, head_dim, head, heads, dims, BLOCK_HEADS, PIECES)
        weights_k = load_pieces(weight_k + channel, head_dim, head, heads, dims, BLOCK_HEADS, PIECES)
    axis, speed = axis_speeds(tl.arange(0, BLOCK_DIM // 2)[None, None, :], head_dim // 2)
    # all tokens here are of one frame
    frame_phase = tl.where(axis == 0, (first_number(start_frame, start) + frame) * speed, 0)
    speed = tl.where(axis == 0, 0, speed)
    slot = frame.to(tl.int64)
    if value is not None:
        slot = tl.load(slots + frame).to(tl.int64)
    kept_heads = tl.where((slot >= 0) & (slot < places), heads, 0)  # 0: this frame is not stored

    wide_head = head.to(tl.int64)
    queries = query + batch * query_batch + wide_head * query_head + dim
    keys = key + batch * key_batch + wide_head * key_head + dim
    new_queries = new_query + batch * tokens * channels + head * head_dim + dim
    new_keys = new_key + batch * new_key_batch + wide_head * new_key_head + dim
    total_key = zero_pieces([BLOCK_TOKENS, BLOCK_HEADS, BLOCK_DIM], PIECES)
    total_query = zero_pieces([BLOCK_TOKENS, BLOCK_HEADS, BLOCK_DIM], PIECES)
    last = tl.minimum(run * RUN + RUN, per_frame)
    for first in tl.range(run * RUN, last, BLOCK_TOKENS, num_stages=STAGES):
        offset = first + tl.arange(0, BLOCK_TOKENS)
        exists = (offset < last)[:, None, None]
        inside = exists & dims
        token = (frame * per_frame + offset).to(tl.int64)[:, None, None]
        target = (slot * per_frame + offset)[:, None, None]
        # all loads first, so that they wait for memory together
        raw_query = load_pieces(queries + token * query_token, query_head, head, heads, inside, BLOCK_HEADS, PIECES)
        raw_key = load_pieces(keys + token * key_token, key_head, head, kept_heads, inside, BLOCK_HEADS, PIECES)
        if value is not None:
            values = value + batch * value_batch + wide_head * value_head + dim
            raw_value = load_pieces(
                values + token * value_token, value_head, head, kept_heads, inside, BLOCK_HEADS, PIECES
            )
        row, col = (offset // cols)[:, None, None], (offset % cols)[:, None, None]
        position = tl.where(axis == 1, row, col).to(tl.uint32, bitcast=True).to(tl.int64)
        cos, sin = turns_of_phase(frame_phase + position * speed)
        turned = norm_rotate(raw_query, weights_q, exists, channels, eps, cos, sin, PIECES)
        at = new_queries + token * channels
        store_pieces(at, head_dim, turned, head, heads, inside, BLOCK_HEADS, PIECES)
        if query_sums is not None:
            total_query = add_pieces(total_query, turned, PIECES, NVIDIA)
        turned = norm_rotate(raw_key, weights_k, exists, channels, eps, cos, sin, PIECES)
        at = new_keys + target * new_key_token
        store_pieces(at, new_key_head, turned, head, kept_heads, inside, BLOCK_HEADS, PIECES)
        if value is not None:
            at = pool_value + batch * pool_value_batch + wide_head * pool_value_head + dim + target * pool_value_token
            store_pieces(at, pool_value_head, raw_value, head, kept_heads, inside, BLOCK_HEADS, PIECES)
            total_key = add_pieces(total_key, turned, PIECES, NVIDIA)
    row = ((batch * tl.num_programs(1) + frame) * tl.num_programs(0) + run) * channels
    if value is not None:
        store_sums(key_sums + row, total_key, heads, head_dim, LANE, BLOCK_HEADS, BLOCK_DIM, PIECES)
    if query_sums is not None:
        store_sums(query_sums + row, total_query, heads, head_dim, LANE, BLOCK_HEADS, BLOCK_DIM, PIECES)

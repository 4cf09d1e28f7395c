"""Gradients of memory_attention: a kernel for queries, a kernel for keys and values; no atomics, sums in a fixed order.

With p = exp(logit - lse): d logit = p (<dO, v> - <dO, O> + d lse), and offset = <dO, O> - d lse is computed first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .attention_tiles import chosen_tokens, head_kind, head_sizes, load_rows, query_rows, rows_per_tile, store_rows
from .integers import cdiv, next_power_of_2


@triton.jit
def offset_kernel(
    grad_out, grad_lse, out, offset, rows_total, queries, heads,
    D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """offset [B, H, Lq] = <dO, O> - d lse; rows are (batch, query, head)."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    count = tl.minimum(rows_total - first, ROWS)
    grads = load_rows(grad_out + first * D, D, count, ROWS, D, D_PAD).to(tl.float32)
    outs = load_rows(out + first * D, D, count, ROWS, D, D_PAD).to(tl.float32)
    row = first + tl.arange(0, ROWS)
    token, head = row // heads, row % heads
    place = (token // queries * heads + head) * queries + token % queries
    inside = row < rows_total
    tl.store(offset + place, tl.sum(grads * outs, 1) - tl.load(grad_lse + place, mask=inside, other=0.0), mask=inside)


@triton.jit
def _row_numbers(first, rows, BM: tl.constexpr, OTHER: tl.constexpr):
    row = tl.arange(0, BM)
    return tl.load(first + row, mask=row < rows, other=OTHER)


@triton.jit
def _log_mass(first, rows, BM: tl.constexpr):
    """Log-sum-exps in powers of two; +inf, which makes every share 0, where there is no key or no query."""
    lse = _row_numbers(first, rows, BM, float("inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634)


@triton.jit
def _shares(q, k, log_mass, count, scale, BN: tl.constexpr, PRECISION: tl.constexpr):
    """[BM, BN]: the share of each key in each query's attention; 0 for keys past the end of a frame."""
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    share = tl.exp2(tl.fma(logits, scale * 1.4426950408889634, -log_mass[:, None]))
    if count < BN:
        share = tl.where(tl.arange(0, BN)[None, :] < count, share, 0.0)
    return share


@triton.jit
def _absorb_query(share, do, k, v, offset, acc, PRECISION: tl.constexpr):
    """Adds to acc [BM, D] the gradient of the queries through one tile of keys."""
    grad_share = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    grad_logits = share * (grad_share - offset[:, None])
    return tl.dot(grad_logits.to(k.dtype), k, acc, input_precision=PRECISION)


@triton.jit(
    do_not_specialize=[
        "queries", "heads", "query_block", "blocks", "places", "tokens_per_frame", "candidate_frames", "tokens",
    ]
)  # fmt: skip
def query_kernel(
    query, key, value, frame_table, grad_out, lse, offset, grad_query,
    query_batch, query_token, query_head,
    key_batch, key_token, key_head,
    value_batch, value_token, value_head,
    scale, queries, heads, query_block, blocks, places, tokens_per_frame, candidate_frames, tokens,
    D: tl.constexpr, D_PAD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_query [B, Lq, H, D], one tile of queries per program, through the frame table as in the forward."""
    batch, head, block, first_row, rows = query_rows(tl.program_id(0), queries, heads, query_block, blocks, BM)
    batch, head = batch.to(tl.int64), head.to(tl.int64)
    table_row = frame_table + ((batch * heads + head) * blocks + block) * places
    first_query = query + batch * query_batch + head * query_head + first_row.to(tl.int64) * query_token
    first_out = ((batch * queries + first_row) * heads + head) * D  # grad_out and grad_query are contiguous
    first_number = (batch * heads + head) * queries + first_row
    q = load_rows(first_query, query_token, rows, BM, D, D_PAD)
    do = load_rows(grad_out + first_out, heads * D, rows, BM, D, D_PAD)
    log_mass = _log_mass(lse + first_number, rows, BM)
    row_offset = _row_numbers(offset + first_number, rows, BM, 0.0)
    keys = key + batch * key_batch + head * key_head
    values = value + batch * value_batch + head * value_head
    acc = tl.zeros([BM, D_PAD], tl.float32)
    for unit in tl.range(0, places * tl.cdiv(tokens_per_frame, BN)):
        frame, start, count = chosen_tokens(unit, table_row, tokens_per_frame, candidate_frames, BN)
        token = frame.to(tl.int64) * tokens_per_frame + start
        k = load_rows(keys + token * key_token, key_token, count, BN, D, D_PAD)
        share = _shares(q, k, log_mass, count, scale, BN, PRECISION)
        # asked for after the first product, so that it does not wait for the values
        v = load_rows(values + token * value_token, value_token, count, BN, D, D_PAD)
        acc = _absorb_query(share, do, k, v, row_offset, acc, PRECISION)
    candidates = candidate_frames.to(tl.int64) * tokens_per_frame
    for unit in tl.range(0, tl.cdiv((tokens - candidates).to(tl.int32), BN)):
        token = candidates + unit * BN
        count = (tokens - token).to(tl.int32)
        k = load_rows(keys + token * key_token, key_token, count, BN, D, D_PAD)
        share = _shares(q, k, log_mass, count, scale, BN, PRECISION)
        v = load_rows(values + token * value_token, value_token, count, BN, D, D_PAD)
        acc = _absorb_query(share, do, k, v, row_offset, acc, PRECISION)
    store_rows(grad_query + first_out, 0, heads * D, rows, acc * scale, BM, D, D_PAD)


@triton.jit(
    do_not_specialize=[
        "queries", "heads", "query_block", "blocks", "places", "tokens_per_frame", "candidate_frames", "tokens",
    ]
)  # fmt: skip
def key_kernel(
    query, key, value, frame_table, grad_out, lse, offset, grad_key, grad_value,
    query_batch, query_token, query_head,
    key_batch, key_token, key_head,
    value_batch, value_token, value_head,
    scale, queries, heads, query_block, blocks, places, tokens_per_frame, candidate_frames, tokens,
    D: tl.constexpr, D_PAD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
    PLACES_PAD: tl.constexpr,
):  # fmt: skip
    """grad_key and grad_value [B, F*N, H, D], one tile of keys per program; grid (tiles, H, B).

    A candidate frame weighs as often as the table of a block of queries names it; blocks that do not are skipped.
    """
    tile, head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    tiles_per_frame = tl.cdiv(tokens_per_frame, BN)
    candidate_tiles = candidate_frames * tiles_per_frame
    candidates = candidate_frames.to(tl.int64) * tokens_per_frame
    competes = tile < candidate_tiles
    frame = tile // tiles_per_frame
    start = tile % tiles_per_frame * BN
    later = candidates + (tile - candidate_tiles).to(tl.int64) * BN
    token = tl.where(competes, frame.to(tl.int64) * tokens_per_frame + start, later)
    count = tl.where(competes, tokens_per_frame - start, tokens - later).to(tl.int32)
    k = load_rows(key + batch * key_batch + head * key_head + token * key_token, key_token, count, BN, D, D_PAD)
    v = load_rows(
        value + batch * value_batch + head * value_head + token * value_token, value_token, count, BN, D, D_PAD
    )
    queries_of_head = query + batch * query_batch + head * query_head
    grads_of_head = grad_out + (batch * queries * heads + head) * D
    numbers = (batch * heads + head) * queries
    acc_k = tl.zeros([BN, D_PAD], tl.float32)
    acc_v = tl.zeros([BN, D_PAD], tl.float32)
    for block in tl.range(0, blocks):
        uses = tl.where(competes, 0, 1)
        if competes:
            place = tl.arange(0, PLACES_PAD)
            table_row = frame_table + ((batch * heads + head) * blocks + block) * places
            uses = tl.sum((tl.load(table_row + place, mask=place < places, other=-1) == frame).to(tl.int32))
        if uses > 0:
            block_end = tl.minimum((block + 1) * query_block, queries)
            for first_row in tl.range(block * query_block, block_end, BM):
                rows = block_end - first_row
                far = tl.cast(first_row, tl.int64)
                q = load_rows(queries_of_head + far * query_token, query_token, rows, BM, D, D_PAD)
                log_mass = _log_mass(lse + numbers + first_row, rows, BM)
                logits = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BN, BM]
                share = tl.exp2(tl.fma(logits, scale * 1.4426950408889634, -log_mass[None, :])) * uses
                do = load_rows(grads_of_head + far * heads * D, heads * D, rows, BM, D, D_PAD)
                acc_v = tl.dot(share.to(do.dtype), do, acc_v, input_precision=PRECISION)
                grad_share = tl.dot(v, tl.trans(do), input_precision=PRECISION)
                row_offset = _row_numbers(offset + numbers + first_row, rows, BM, 0.0)
                grad_logits = share * (grad_share - row_offset[None, :])
                acc_k = tl.dot(grad_logits.to(q.dtype), q, acc_k, input_precision=PRECISION)
    first_key = (batch * tokens * heads + head) * D  # the gradients are contiguous
    store_rows(grad_key + first_key, token, heads * D, count, acc_k * scale, BN, D, D_PAD)
    store_rows(grad_value + first_key, token, heads * D, count, acc_v, BN, D, D_PAD)


def memory_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    frame_table: Tensor | None,
    tokens_per_frame: int,
    candidate_frames: int,
    scale: float,
    query_block: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, contiguous; arguments and meaning as in the reference."""
    batch, queries, heads, head_dim = query.shape
    tokens = key.shape[1]
    if 0 in query.shape or 0 in key.shape:
        return tuple(x.new_zeros(x.shape) for x in (query, key, value))
    if frame_table is None:
        frame_table, candidate_frames = torch.empty((batch, heads, 0), dtype=torch.int32, device=query.device), 0
    grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse
    frame_table, grad_out, grad_lse, out, lse = (x.contiguous() for x in (frame_table, grad_out, grad_lse, out, lse))
    query_block = min(query_block or queries, queries)
    blocks = cdiv(queries, query_block)
    places = frame_table.shape[-1] if candidate_frames else 0
    sizes = head_sizes(query)

    offset = torch.empty_like(lse)
    rows_each = 16
    offset_kernel[(cdiv(batch * queries * heads, rows_each),)](
        grad_out, grad_lse, out, offset, batch * queries * heads, queries, heads,
        D=head_dim, D_PAD=sizes["D_PAD"], ROWS=rows_each,
    )  # fmt: skip
    strides = (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3])
    counts = (queries, heads, query_block, blocks, places, tokens_per_frame, candidate_frames, tokens)
    inputs = (query, key, value, frame_table, grad_out, lse, offset)

    grad_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    config = configs.config(f"attention_backward_query_{head_kind(query)}", query.device)
    rows, warps = rows_per_tile(config, query_block)
    query_kernel[(batch * heads * blocks * cdiv(query_block, rows),)](
        *inputs, grad_query, *strides, scale, *counts, BM=rows, BN=config.blocks["BN"], **sizes,
        num_warps=warps, num_stages=config.stages,
    )  # fmt: skip

    grad_key = torch.empty(key.shape, dtype=key.dtype, device=key.device)
    grad_value = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    config = configs.config(f"attention_backward_key_{head_kind(query)}", query.device)
    rows, warps = rows_per_tile(config, query_block)
    keys = config.blocks["BN"]
    tiles = candidate_frames * cdiv(tokens_per_frame, keys)
    tiles += cdiv(tokens - candidate_frames * tokens_per_frame, keys)
    key_kernel[(tiles, heads, batch)](
        *inputs, grad_key, grad_value, *strides, scale, *counts, BM=rows, BN=keys, **sizes,
        PLACES_PAD=next_power_of_2(max(places, 1)), num_warps=warps, num_stages=config.stages,
    )  # fmt: skip
    return grad_query, grad_key, grad_value

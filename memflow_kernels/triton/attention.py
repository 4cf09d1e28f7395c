"""memory_attention: chosen frames are read where they lie, through the frame table; then the tokens always attended to.

The work of one tile of queries is a row of key tiles ("units"): those of its chosen frames, one scalar frame index per
tile and the end of the frame masked, then those of the tokens behind the candidates, which are one contiguous range.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dtypes import statistics_dtype
from ..reference.attend import nothing
from . import configs, gluon
from .attention_backward import memory_attention_backward
from .attention_plan import KEPT, Call, Plan, in_order, plan
from .attention_schedule import schedule, share_of_program
from .attention_tiles import (
    chosen_tokens,
    head_kind,
    head_sizes,
    load_rows,
    query_rows,
    row_offsets,
    rows_per_tile,
    store_rows,
)
from .descriptors import key_forms
from .gather import gather_frames
from .integers import cdiv, next_power_of_2
from .layouts import Layout
from .vendor import attend_dense, serves

__all__ = ["memory_attention", "memory_attention_backward"]


@triton.jit
def _logits(q, k, count, BN: tl.constexpr, PRECISION: tl.constexpr):
    """[BM, BN], unscaled; -inf for keys past the end of a frame."""
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if count < BN:  # a branch: most tiles are full and need no masking
        logits = tl.where(tl.arange(0, BN)[None, :] < count, logits, float("-inf"))
    return logits


@triton.jit
def _absorb(logits, v, acc, top, mass, scale, PRECISION: tl.constexpr):
    """Online softmax over one more tile of keys; top is the largest logit so far, in powers of two like scale.

    tl.fma: one rounding and one instruction, whatever the compiler may fuse by itself.
    """
    new_top = tl.maximum(top, tl.max(logits, 1) * scale)
    share = tl.exp2(tl.fma(logits, scale, -new_top[:, None]))
    shrink = tl.exp2(top - new_top)
    mass = tl.fma(mass, shrink, tl.sum(share, 1))
    acc = tl.dot(share.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, new_top, mass


@triton.jit(
    do_not_specialize=[
        "queries", "heads", "query_block", "blocks", "places", "tokens_per_frame", "candidate_frames", "tokens",
        "whole", "pieces",
    ]
)  # fmt: skip
def forward_kernel(
    query, key, value, key_frames, value_frames, key_rest, value_rest,
    frame_table, out, lse, partial_out, partial_lse, scale,
    query_batch, query_token, query_head,
    key_batch, key_token, key_head,
    value_batch, value_token, value_head,
    queries, heads, query_block, blocks, places, tokens_per_frame, candidate_frames, tokens, whole, pieces,
    D: tl.constexpr, D_PAD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, ONLY_INCOMPLETE: tl.constexpr, PLACES_PAD: tl.constexpr,
):  # fmt: skip
    """Writes out [B, Lq, H, D] and lse [B, H, Lq] of a whole tile, or partial_* of a piece of one.

    scale is positive and times log2(e). ONLY_INCOMPLETE: only tiles whose table row has an empty place.
    """
    candidates = candidate_frames.to(tl.int64) * tokens_per_frame
    table_units = places * tl.cdiv(tokens_per_frame, BN)
    units = table_units + tl.cdiv((tokens - candidates).to(tl.int32), BN)
    program = tl.program_id(0)
    tile, first, last = share_of_program(program, whole, pieces, units)
    batch, head, block, first_row, rows = query_rows(tile, queries, heads, query_block, blocks, BM)
    batch, head = batch.to(tl.int64), head.to(tl.int64)
    table_row = frame_table + ((batch * heads + head) * blocks + block) * places
    if ONLY_INCOMPLETE:
        place = tl.arange(0, PLACES_PAD)
        if tl.min(tl.load(table_row + place, mask=place < places, other=0)) >= 0:
            return

    offsets, inside = row_offsets(first_row, query_token, rows, BM, D, D_PAD)
    q = tl.load(query + batch * query_batch + head * query_head + offsets, mask=inside, other=0.0)
    keys = key + batch * key_batch + head * key_head
    values = value + batch * value_batch + head * value_head
    acc = tl.zeros([BM, D_PAD], tl.float32)
    top = tl.full([BM], -3.0e38, tl.float32)  # finite, so that a row without a key meets no inf - inf
    mass = tl.zeros([BM], tl.float32)
    for unit in tl.range(first, tl.minimum(last, table_units)):
        frame, start, count = chosen_tokens(unit, table_row, tokens_per_frame, candidate_frames, BN)
        if DESCRIPTORS:
            at = [batch.to(tl.int32), head.to(tl.int32), frame, start, 0]
            logits = _logits(q, key_frames.load(at).reshape(BN, D_PAD), count, BN, PRECISION)
            # asked for after the first product, so that it does not wait for the values
            v = value_frames.load(at).reshape(BN, D_PAD)
        else:
            token = frame.to(tl.int64) * tokens_per_frame + start
            k = load_rows(keys + token * key_token, key_token, count, BN, D, D_PAD)
            logits = _logits(q, k, count, BN, PRECISION)
            v = load_rows(values + token * value_token, value_token, count, BN, D, D_PAD)
        acc, top, mass = _absorb(logits, v, acc, top, mass, scale, PRECISION)
    for unit in tl.range(tl.maximum(first, table_units), last):
        token = candidates + (unit - table_units) * BN
        count = (tokens - token).to(tl.int32)
        if DESCRIPTORS:
            at = [batch.to(tl.int32), head.to(tl.int32), token.to(tl.int32), 0]
            logits = _logits(q, key_rest.load(at).reshape(BN, D_PAD), count, BN, PRECISION)
            v = value_rest.load(at).reshape(BN, D_PAD)
        else:
            k = load_rows(keys + token * key_token, key_token, count, BN, D, D_PAD)
            logits = _logits(q, k, count, BN, PRECISION)
            v = load_rows(values + token * value_token, value_token, count, BN, D, D_PAD)
        acc, top, mass = _absorb(logits, v, acc, top, mass, scale, PRECISION)

    some = tl.where(mass == 0, 1.0, mass)
    acc = acc / some[:, None]
    log_mass = tl.where(mass == 0, float("-inf"), top + tl.log2(some))  # [BM]
    row = tl.arange(0, BM)
    if program < whole:
        store_rows(out + (batch * queries * heads + head) * D, first_row, heads * D, rows, acc, BM, D, D_PAD)
        first_lse = lse + (batch * heads + head) * queries + first_row
        tl.store(first_lse + row, log_mass * 0.6931471805599453, mask=row < rows)
    else:
        slot = (program - whole) * BM
        store_rows(partial_out, slot, D, rows, acc, BM, D, D_PAD)
        tl.store(partial_lse + slot + row, log_mass, mask=row < rows)


def _plan(call: Call) -> Plan | None:
    """The plan of this file's kernel; None where no key is attended to."""
    batch, queries, heads, _ = call.query.shape
    query_block, blocks = call.block_sizes
    places, candidate_frames = call.chosen
    tokens, tokens_per_frame = call.key.shape[1], call.tokens_per_frame
    name = f"attention_forward_{head_kind(call.query)}"
    config, forms = configs.config(name, call.device), None
    if config.descriptors:
        forms = key_forms(call.key, call.value, tokens_per_frame, config.blocks["BN"])
        config = config if forms else configs.TABLE[name]["any"]
    rows, warps = rows_per_tile(config, query_block)
    keys = config.blocks["BN"]
    units = places * cdiv(tokens_per_frame, keys) + cdiv(tokens - candidate_frames * tokens_per_frame, keys)
    if units == 0:
        return None
    tiles = batch * heads * blocks * cdiv(query_block, rows)
    whole, pieces = schedule(tiles, units, config.resident * configs.multiprocessors(call.device))
    if call.only_incomplete:
        whole, pieces = tiles, 1
    strides = (stride for x in (call.query, call.key, call.value) for stride in x.strides[:3])
    numbers = (queries, heads, query_block, blocks, places, tokens_per_frame, candidate_frames, tokens, whole, pieces)
    described = zip((1, 2, 1, 2), forms, strict=True) if forms else ((3, None),) * 4
    constants = {
        "BM": rows, "BN": keys, "DESCRIPTORS": forms is not None, "ONLY_INCOMPLETE": call.only_incomplete,
        "PLACES_PAD": next_power_of_2(max(places, 1)), **head_sizes(call.query),
    }  # fmt: skip
    numbers = (*strides, *numbers, *in_order(forward_kernel, constants))
    options = {"num_warps": warps, "num_stages": config.stages}
    operands = ((0, None), (1, None), (2, None), *described)
    return plan(call, forward_kernel, operands, numbers, options, rows, tiles, whole, pieces)


@functools.lru_cache(maxsize=KEPT)
def planned(device: torch.device, query: tuple, key: tuple, value: tuple, *others: object) -> Plan | None:
    """The plan of a call by the kernel that the configuration names; None where no key is attended to.

    The arguments are the fields of `Call`; tensors are the fields of `Layout`, as making those takes longer than
    finding the plan. What it depends on beside them is fixed while a program runs; whoever changes the tables of
    configs.py calls planned.cache_clear().
    """
    call = Call(device, Layout(*query), Layout(*key), Layout(*value), *others)
    head_dims = configs.of_family(configs.SPECIALISED, device)
    if gluon.AVAILABLE and call.query.shape[3] in head_dims and not call.only_incomplete:
        from .gluon import attention as specialised  # only here: older releases of Triton cannot import it

        if specialised.serves(call):
            return specialised.planned(call)
    return _plan(call)


def launch_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    frame_table: Tensor | None,
    tokens_per_frame: int,
    candidate_frames: int,
    scale: float,
    query_block: int | None,
    out: Tensor,
    lse: Tensor,
    only_incomplete: bool = False,
) -> None:
    """Writes out and lse, contiguous; with only_incomplete those of heads whose table has an empty place."""
    if scale <= 0:  # the kernels find the largest logit before they scale
        query, scale = -query, max(-scale, 1e-30)
    found = planned(
        query.device,
        (query.dtype, query.shape, query.stride(), query.data_ptr() % 16 == 0),
        (key.dtype, key.shape, key.stride(), key.data_ptr() % 16 == 0),
        (value.dtype, value.shape, value.stride(), value.data_ptr() % 16 == 0),
        None if frame_table is None else frame_table.shape,
        tokens_per_frame,
        candidate_frames,
        query_block,
        only_incomplete,
    )
    if found is None:
        out.zero_()
        lse.fill_(-torch.inf)
    else:
        found.launch(query, key, value, frame_table, scale, out, lse)


def memory_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    frame_table: Tensor | None,
    tokens_per_frame: int,
    candidate_frames: int,
    scale: float,
    query_block: int | None,
) -> tuple[Tensor, Tensor]:
    """out [B, Lq, H, D] and lse [B, H, Lq], by the kernel that the configuration names; arguments as in the reference.

    A table per block of queries, or of no place at all, is always read in place.
    """
    sizes = (tokens_per_frame, candidate_frames, scale, query_block)
    shape = query.shape
    if 0 in shape or 0 in key.shape:
        return nothing(query)
    if frame_table is None:
        kernel = configs.of_family(configs.DENSE, query.device)
        if kernel != "triton" and serves(kernel, query):
            return attend_dense(kernel, query, key, value, scale)
    elif query_block is None and frame_table.shape[-1] and candidate_frames:
        kernel = configs.of_family(configs.CHOSEN, query.device)
        if kernel != "triton" and serves(kernel, query):
            packed = gather_frames(key, value, frame_table, tokens_per_frame, candidate_frames)
            out, lse = attend_dense(kernel, query, *packed, scale)
            # zeros in an empty place are keys too: heads that have one are done again, in place
            launch_forward(query, key, value, frame_table, *sizes, out, lse, only_incomplete=True)
            return out, lse
    dtype, device = query.dtype, query.device
    out = torch.empty(shape, dtype=dtype, device=device)
    lse = torch.empty((shape[0], shape[2], shape[1]), dtype=statistics_dtype(dtype), device=device)
    launch_forward(query, key, value, frame_table, *sizes, out, lse)
    return out, lse

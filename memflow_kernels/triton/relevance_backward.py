"""Gradients of softmax relevance. Logits are computed again; every sum is taken in a fixed order, without atomics.

With p the softmax over all tokens of all frames and P_f its sum over frame f:
d logit = p (g_f - sum_e g_e P_e) * weight of the text token / H.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .integers import cdiv
from .relevance_tiles import dot_sizes, frame_lse, load_rows, load_tokens, tile_sizes


@triton.jit
def centre_kernel(
    grad,  # [B, F] float32, contiguous
    lse,  # [B, H, T, F] float32, contiguous; overwritten by (g_f - sum_e g_e P_e) * weight / H
    mask,  # [B, T] bool, contiguous, or None
    total,  # [B, H, T] float32, contiguous: log-sum-exp over all frames
    heads, tokens, frames,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_FRAMES: tl.constexpr,
):  # fmt: skip
    """One program: one batch row."""
    batch = tl.program_id(0).to(tl.int64)
    frame = tl.arange(0, BLOCK_FRAMES)
    grads = tl.load(grad + batch * frames + frame, frame < frames, other=0.0)[None, :]
    counted = tl.zeros([BLOCK_TOKENS], tl.int32)
    for start in range(0, tokens, BLOCK_TOKENS):
        token = start + tl.arange(0, BLOCK_TOKENS)
        counted += load_tokens(mask, batch, token, tokens, token < tokens).to(tl.int32)
    count = tl.maximum(tl.sum(counted, 0), 1)
    for start in range(0, heads * tokens, BLOCK_TOKENS):
        row = start + tl.arange(0, BLOCK_TOKENS)
        exists = row < heads * tokens
        counts = load_tokens(mask, batch, row % tokens, tokens, exists)
        weight = tl.where(counts, 1.0 / (count * heads), 0.0)[:, None]
        inside = exists[:, None] & (frame < frames)[None, :]
        place = batch * heads * tokens + row
        logits = tl.load(lse + place[:, None] * frames + frame[None, :], inside, other=float("-inf"))
        top = tl.where(exists, tl.max(logits, 1), 0.0)
        mass = tl.exp(logits - top[:, None])
        sums = tl.where(exists, tl.sum(mass, 1), 1.0)
        expected = tl.sum(mass * grads, 1) / sums
        tl.store(lse + place[:, None] * frames + frame[None, :], (grads - expected[:, None]) * weight, inside)
        tl.store(total + place, top + tl.log(sums), exists)


@triton.jit
def grad_logits(queries, columns, all_mass, centred, scale):
    """[BLOCK_TEXT, BLOCK_KEYS]: gradient of the products of text and keys."""
    logits = tl.dot(queries, tl.trans(columns), input_precision="ieee") * scale
    return tl.exp(logits - all_mass[:, None]) * centred[:, None] * scale


@triton.jit
def grad_text_kernel(
    text, key, total, centred, grad_text,
    text_batch, text_token, text_head,
    key_batch, key_token, key_head,
    scale, tokens, heads, frames, tokens_per_frame, head_dim,
    BLOCK_TEXT: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """One program: the gradient of BLOCK_TEXT tokens of one head, over all frames."""
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * BLOCK_TEXT + tl.arange(0, BLOCK_TEXT)
    keys = key + batch * key_batch + head * key_head
    queries = load_rows(
        text + batch * text_batch + head * text_head, token, text_token, tokens, head_dim, BLOCK_DIM
    ).to(tl.float32)
    row = (batch * heads + head) * tokens + token
    all_mass = tl.load(total + row, token < tokens, other=float("inf"))
    acc = tl.zeros([BLOCK_TEXT, BLOCK_DIM], tl.float32)
    for frame in range(frames):
        weight = tl.load(centred + row * frames + frame, token < tokens, other=0.0)
        last = (frame + 1) * tokens_per_frame
        for start in range(frame * tokens_per_frame, last, BLOCK_KEYS):
            place = start + tl.arange(0, BLOCK_KEYS)
            columns = load_rows(keys, place, key_token, last, head_dim, BLOCK_DIM).to(tl.float32)
            grads = grad_logits(queries, columns, all_mass, weight, scale)  # times a key of 0 outside the frame
            acc = tl.dot(grads, columns, acc, input_precision="ieee")
    dim = tl.arange(0, BLOCK_DIM)
    target = grad_text + ((batch * tokens + token) * heads + head)[:, None] * head_dim + dim[None, :]
    inside = (token < tokens)[:, None] & (dim < head_dim)[None, :]
    tl.store(target, acc.to(grad_text.dtype.element_ty), inside)


@triton.jit
def grad_key_kernel(
    text, key, total, centred, grad_key,
    text_batch, text_token, text_head,
    key_batch, key_token, key_head,
    scale, tokens, heads, frames, tokens_per_frame, head_dim,
    BLOCK_TEXT: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """One program: the gradient of BLOCK_KEYS keys of one frame and head, over all text tokens."""
    frame, head = tl.program_id(1) // heads, (tl.program_id(1) % heads).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    place = tl.program_id(0) * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    first = frame.to(tl.int64) * tokens_per_frame
    keys = key + batch * key_batch + first * key_token + head * key_head
    columns = load_rows(keys, place, key_token, tokens_per_frame, head_dim, BLOCK_DIM).to(tl.float32)
    acc = tl.zeros([BLOCK_KEYS, BLOCK_DIM], tl.float32)
    for start in range(0, tokens, BLOCK_TEXT):
        token = start + tl.arange(0, BLOCK_TEXT)
        queries = load_rows(
            text + batch * text_batch + head * text_head, token, text_token, tokens, head_dim, BLOCK_DIM
        ).to(tl.float32)
        row = (batch * heads + head) * tokens + token
        all_mass = tl.load(total + row, token < tokens, other=float("inf"))
        weight = tl.load(centred + row * frames + frame, token < tokens, other=0.0)
        grads = grad_logits(queries, columns, all_mass, weight, scale)
        acc = tl.dot(tl.trans(grads), queries, acc, input_precision="ieee")
    dim = tl.arange(0, BLOCK_DIM)
    row = (batch * frames * tokens_per_frame + first + place) * heads + head
    inside = (place < tokens_per_frame)[:, None] & (dim < head_dim)[None, :]
    tl.store(grad_key + row[:, None] * head_dim + dim[None, :], acc.to(grad_key.dtype.element_ty), inside)


def prompt_relevance_softmax_backward(
    grad: Tensor, text_key: Tensor, key: Tensor, text_mask: Tensor | None, tokens_per_frame: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients of text_key and key for grad [B, F]."""
    batch, tokens, heads, head_dim = text_key.shape
    frames = key.shape[1] // tokens_per_frame
    grad_text, grad_key = text_key.new_zeros(text_key.shape), key.new_empty(key.shape)
    if not frames:
        return grad_text, grad_key
    mask = None
    if text_mask is not None:
        mask = text_mask.contiguous()
        text_key = text_key.masked_fill(~mask[:, :, None, None], 0.0)  # may hold anything, and 0 times NaN is NaN
    lse = frame_lse(text_key, key, tokens_per_frame, scale)
    total = lse.new_empty((batch, heads, tokens))
    centre_kernel[(batch,)](
        grad.contiguous(), lse, mask, total, heads, tokens, frames, **tile_sizes("relevance_share", frames, key.device)
    )
    sizes = (float(scale), tokens, heads, frames, tokens_per_frame, head_dim)
    strides = (*text_key.stride()[:3], *key.stride()[:3])
    options = dot_sizes("relevance_gradient", head_dim, key.device)
    text_blocks = cdiv(tokens, options["BLOCK_TEXT"])
    key_blocks = cdiv(tokens_per_frame, options["BLOCK_KEYS"])
    states = (text_key, key, total, lse)
    grad_text_kernel[(text_blocks, heads, batch)](*states, grad_text, *strides, *sizes, **options)
    grad_key_kernel[(key_blocks, frames * heads, batch)](*states, grad_key, *strides, *sizes, **options)
    return grad_text, grad_key

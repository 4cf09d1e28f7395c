"""The gradients of qk_norm_rope: one launch and one of partial sums for each of query and key."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import config
from .integers import cdiv, next_power_of_2
from .means import write_means
from .qk_norm_rope_tiles import first_number, inverse_rms
from .rotary import axis_speeds, rotate, turns_of_phase


@triton.jit(do_not_specialize=["start_frame", "tokens", "heads", "rows", "cols"])
def norm_rope_backward_kernel(
    grad, x,  # [B, L, H, D]
    weight,  # [H*D]
    grad_x,  # [B, L, H, D], contiguous
    sums,  # [programs, H*D] float32: gradient of the weight, one row per program
    start,
    grad_batch, grad_token, grad_head,
    x_batch, x_token, x_head,
    tokens, heads, head_dim, rows, cols, start_frame, eps,
    RUN: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One program: up to RUN tokens of one batch row. With n = x r, r = 1 / rms, g = grad turned back:

    d weight = sum g n; d x = r (g w - n mean(g w n)). The roundings of the forward count as the identity.
    """
    run, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channels = heads * head_dim
    head, dim = tl.arange(0, BLOCK_HEADS)[None, :, None], tl.arange(0, BLOCK_DIM)[None, None, :]
    exists = (head < heads) & (dim < head_dim)
    wide_weight = tl.load(weight + head * head_dim + dim, exists, other=0.0).to(tl.float32)
    axis, speed = axis_speeds(tl.arange(0, BLOCK_DIM // 2)[None, None, :], head_dim // 2)
    first_frame = first_number(start_frame, start)
    wide_head = head.to(tl.int64)
    grads = grad + batch * grad_batch + wide_head * grad_head + dim
    states = x + batch * x_batch + wide_head * x_head + dim
    targets = grad_x + batch * tokens * channels + head * head_dim + dim
    total = tl.zeros([BLOCK_TOKENS, BLOCK_HEADS, BLOCK_DIM], tl.float32)
    last = tl.minimum(run * RUN + RUN, tokens)
    for first in tl.range(run * RUN, last, BLOCK_TOKENS, num_stages=STAGES):
        place = first + tl.arange(0, BLOCK_TOKENS)
        inside = (place < last)[:, None, None] & exists
        token = place.to(tl.int64)[:, None, None]
        raw_grad = tl.load(grads + token * grad_token, inside, other=0.0)
        wide = tl.load(states + token * x_token, inside, other=0.0).to(tl.float32)
        row, col = (place // cols % rows)[:, None, None], (place % cols)[:, None, None]
        frame = first_frame + (place // (rows * cols))[:, None, None]
        position = tl.where(axis == 0, frame.to(tl.int64), tl.where(axis == 1, row, col).to(tl.int64))
        cos, sin = turns_of_phase(position * speed)
        back = rotate(raw_grad.to(tl.float32), cos, -sin)
        inverse = inverse_rms(wide * wide, channels, eps)
        normed = wide * inverse
        total += tl.where(inside, back * normed, 0.0)
        back *= wide_weight
        mean = tl.sum(tl.sum(back * normed, 2), 1)[:, None, None] / (channels * 1.0)
        tl.store(targets + token * channels, (inverse * (back - normed * mean)).to(grad_x.dtype.element_ty), inside)
    row = batch * tl.num_programs(0) + run
    tl.store(sums + row * channels + head * head_dim + dim, tl.sum(total, 0)[None, :, :], exists)


def _launch_options(heads: int, head_dim: int, device: torch.device) -> dict[str, int]:
    """Options of a launch: as many tokens at a time as make up a tile of TILE numbers, 16 per thread at most."""
    options = config("norm_rope_backward", device).options
    heads, head_dim = next_power_of_2(heads), next_power_of_2(head_dim)
    at_once = max(min(options.pop("TILE") // (heads * head_dim), next_power_of_2(options["RUN"])), 1)
    options["num_warps"] = max(options["num_warps"], at_once * heads * head_dim // 512)
    blocks = {"BLOCK_TOKENS": at_once, "BLOCK_HEADS": heads, "BLOCK_DIM": head_dim}
    return {**options, **blocks, "STAGES": options["num_stages"]}


def _backward(grad, x, weight, eps, rows, cols, start_frame, start):
    """Gradients of one of query and key, and of its weight."""
    batch, tokens, heads, head_dim = x.shape
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    grad_x = x.new_empty(x.shape)
    options = _launch_options(heads, head_dim, x.device)
    runs = cdiv(tokens, options["RUN"])
    sums = x.new_empty((1, batch * runs, heads, head_dim), dtype=torch.float32)
    norm_rope_backward_kernel[(runs, batch)](
        grad, x, weight.contiguous(), grad_x, sums, start,
        *grad.stride()[:3], *x.stride()[:3],
        tokens, heads, head_dim, rows, cols, start_frame, eps,
        **options,
    )  # fmt: skip
    grad_weight = x.new_empty((1, 1, heads, head_dim), dtype=torch.float32)
    write_means(sums, grad_weight, sums.shape[1], divisor=1)
    return grad_x, grad_weight.flatten().to(weight.dtype)


def qk_norm_rope_backward(
    grad_query: Tensor,
    grad_key: Tensor,
    query: Tensor,
    key: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    eps: float,
    rows: int,
    cols: int,
    start_frame: int,
    start: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, weight_q, weight_k; the same every time."""
    place = (eps, rows, cols, start_frame, start)
    grad_query, grad_weight_q = _backward(grad_query, query, weight_q, *place)
    grad_key, grad_weight_k = _backward(grad_key, key, weight_k, *place)
    return grad_query, grad_key, grad_weight_q, grad_weight_k

"""qk_norm_rope and qk_norm_rope_write: RMS norm over all heads, 3-axis rotary, and the write into the pool."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..dtypes import statistics_dtype
from .means import frame_means
from .rotary import inverse_rms, norm_shape, rms_norm_heads, rotate, rotation_table


def _table(x: Tensor, rows: int, cols: int, start_frame: int, start: Tensor | None, axes, theta: float) -> Tensor:
    """Turns for x [B, L, H, D], rounded once to the precision of the arithmetic (float32; float64 for float64)."""
    dtype = torch.complex128 if x.dtype == torch.float64 else torch.complex64
    sizes = (x.shape[-1], x.shape[1] // (rows * cols), (rows, cols))
    if x.device.type == "cpu":  # reading the number of the frame waits for nothing
        first, axes = start_frame if start is None else start_frame + int(start), tuple(axes) if axes else None
        return _cpu_table(*sizes, first, dtype, axes, theta)
    first = start_frame if start is None else start + start_frame
    return rotation_table(*sizes, first, x.device, axes, theta).to(dtype)


@functools.lru_cache(maxsize=4)
def _cpu_table(head_dim: int, frames: int, grid: tuple, first: int, dtype: torch.dtype, axes, theta: float) -> Tensor:
    """All layers and passes of a chunk turn alike; the table of a chunk outweighs a small model's other work."""
    return rotation_table(head_dim, frames, grid, first, torch.device("cpu"), axes, theta).to(dtype)


def qk_norm_rope(
    query: Tensor,
    key: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    eps: float,
    rows: int,
    cols: int,
    start_frame: int,
    start: Tensor | None,
    axes: list[int] | None = None,
    theta: float = 10000.0,
    per_head: bool = False,
) -> tuple[Tensor, Tensor]:
    """query, key [B, L, H, D], weight_* [H*D] -> the same; the first frame has number start_frame + start.

    per_head: every head is normed by itself, weight_* are [D].
    """
    table = _table(query, rows, cols, start_frame, start, axes, theta)
    normed = rms_norm_heads(query, weight_q, eps, per_head), rms_norm_heads(key, weight_k, eps, per_head)
    query, key = (rotate(x, table, out=x).contiguous() for x in normed)
    return query, key


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, inverse_table: Tensor, per_head: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight for y = rotate(x r w), r = 1 / rms(x); the roundings count as the identity."""
    wide = statistics_dtype(x.dtype)
    grad = rotate(grad.to(wide), inverse_table)
    together = norm_shape(x, per_head)
    dims = tuple(range(-len(together), 0))
    inverse = inverse_rms(x, dims, eps)
    normed = x * inverse
    grad_weight = (grad * normed).flatten(0, -len(together) - 1).sum(0).flatten()
    grad = grad * weight.view(together)
    grad_x = inverse * (grad - normed * (grad * normed).mean(dims, keepdim=True))
    return grad_x.to(x.dtype).contiguous(), grad_weight.to(weight.dtype)


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
    axes: list[int] | None = None,
    theta: float = 10000.0,
    per_head: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, weight_q, weight_k."""
    inverse_table = _table(query, rows, cols, start_frame, start, axes, theta).conj().resolve_conj()
    grad_query, grad_weight_q = _backward(grad_query, query, weight_q, eps, inverse_table, per_head)
    grad_key, grad_weight_k = _backward(grad_key, key, weight_k, eps, inverse_table, per_head)
    return grad_query, grad_key, grad_weight_q, grad_weight_k


@functools.lru_cache(maxsize=64)  # all layers and passes of a chunk
def _runs(slots: tuple[int, ...], available: int) -> list[tuple[int, int, int]]:
    """(first frame, its slot, count) of frames that go to slots next to one another; -1 = not stored."""
    if any(not -1 <= slot < available for slot in slots):
        raise ValueError(
            f"slots is {list(slots)}: each must be -1 (not stored) or a slot of the pool, 0 to {available - 1}"
        )
    stored = [slot for slot in slots if slot >= 0]
    if len(set(stored)) < len(stored):
        raise ValueError(f"slots is {list(slots)}: two frames cannot take the same slot")
    runs, first = [], 0
    while first < len(slots):
        end = first + 1
        if slots[first] >= 0:
            while end < len(slots) and slots[end] == slots[end - 1] + 1:
                end += 1
            runs.append((first, slots[first], end - first))
        first = end
    return runs


def _turned_query(normed: Tensor, table: Tensor, query_mean: bool) -> tuple[Tensor, Tensor]:
    """The rotated query and the mean over its tokens, empty unless asked for."""
    turned = rotate(normed, table, out=normed).contiguous()
    if query_mean:
        return turned, frame_means(turned, turned.shape[1]).squeeze(1)
    return turned, turned.new_empty((0,), dtype=statistics_dtype(turned.dtype))


def _store_by_index(new: Tensor, held: Tensor, slots: Tensor) -> None:
    """Write new [B, n, ...] to the places `slots` of held [B, S, ...] without reading them on the host.

    A frame with slot -1 repeats another frame's write, so that the order of writes does not matter; where all have it,
    each writes what slot 0 already holds.
    """
    stored, another = slots >= 0, slots.argmax()
    source = torch.where(stored, torch.arange(slots.shape[0], device=slots.device), another)
    slot = slots.long().index_select(0, source).clamp(min=0)
    kept = torch.where(stored.any(), new.index_select(1, source), held.index_select(1, slot))
    held.index_copy_(1, slot, kept)


def qk_norm_rope_write(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight_q: Tensor | None,
    weight_k: Tensor | None,
    eps: float,
    rows: int,
    cols: int,
    start_frame: int,
    start: Tensor | None,
    pool_key: Tensor,
    pool_value: Tensor,
    pool_frame_mean: Tensor,
    slots: Tensor,
    query_mean: bool,
    axes: list[int] | None = None,
    theta: float = 10000.0,
    per_head: bool = False,
) -> tuple[Tensor, Tensor]:
    """Norm and rotate query and key; key, value and the mean key of every frame go to its slot of the pool.

    Without weights query and key are normed already. Returns the new query and, with query_mean, the mean over its
    tokens [B, H, D] (otherwise an empty tensor).
    """
    tokens = rows * cols
    table = _table(query, rows, cols, start_frame, start, axes, theta)
    if weight_q is None:
        normed_query, normed_key = query.clone(), key  # the query is turned in place
    else:
        normed_query, normed_key = (
            rms_norm_heads(x, weight, eps, per_head) for x, weight in ((query, weight_q), (key, weight_k))
        )
    if query.device.type != "cpu":
        new_key = rotate(normed_key, table)
        _store_by_index(new_key.unflatten(1, (-1, tokens)), pool_key.unflatten(1, (-1, tokens)), slots)
        _store_by_index(value.unflatten(1, (-1, tokens)), pool_value.unflatten(1, (-1, tokens)), slots)
        _store_by_index(frame_means(new_key, tokens), pool_frame_mean, slots)
        return _turned_query(normed_query, table, query_mean)

    for frame, slot, count in _runs(tuple(slots.tolist()), pool_frame_mean.shape[1]):
        new_key, new_value, turns = normed_key, value, table
        if count * tokens < new_key.shape[1]:
            source = frame * tokens, count * tokens
            new_key, new_value, turns = (
                normed_key.narrow(1, *source),
                value.narrow(1, *source),
                table.narrow(0, *source),
            )
        place = slot * tokens, count * tokens
        target = pool_key.narrow(1, *place)
        rotate(new_key, turns, out=target)
        pool_value.narrow(1, *place).copy_(new_value)
        pool_frame_mean.narrow(1, slot, count).copy_(frame_means(target, tokens))
    return _turned_query(normed_query, table, query_mean)

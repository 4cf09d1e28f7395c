"""qk_norm_rope and qk_norm_rope_write: RMS norm over all heads, 3-axis rotary, and the write into the pool."""

import torch
from torch import Tensor

from ..dtypes import SUPPORTED, statistics_dtype
from ..pool import Pool
from . import _checks
from .registration import Registered


def _fake(query, key, *rest):
    return query.new_empty(query.shape), key.new_empty(key.shape)


def _fake_backward(grad_query, grad_key, query, key, weight_q, weight_k, *place):
    return tuple(x.new_empty(x.shape) for x in (query, key, weight_q, weight_k))


def _fake_write(query, *rest):
    mean_shape = (query.shape[0], *query.shape[2:]) if rest[-1] else (0,)
    return query.new_empty(query.shape), query.new_empty(mean_shape, dtype=statistics_dtype(query.dtype))


_qk_norm_rope = Registered("qk_norm_rope", _fake)
Registered("qk_norm_rope_backward", _fake_backward)
_qk_norm_rope_write = Registered("qk_norm_rope_write", _fake_write)


@_checks.once_per_kind
def _check(query: Tensor, key: Tensor, weight_q: Tensor, weight_k: Tensor, eps: float, grid: tuple[int, int]) -> None:
    _checks.states("query", query, "[B, L, H, D]")
    _checks.states("key", key, "[B, L, H, D]")
    _checks.shape("key", key, tuple(query.shape), "[B, L, H, D] like query")
    _checks.same_kind("key", key, "query", query)
    _, tokens, heads, head_dim = query.shape
    if head_dim % 2:
        raise ValueError(f"query has head size D = {head_dim}; the rotation turns channel pairs and needs an even one")
    for name, weight in (("weight_q", weight_q), ("weight_k", weight_k)):
        _checks.of_dtype(name, weight, *SUPPORTED)
        _checks.shape(name, weight, (heads * head_dim,), "[H*D]")
        _checks.same_device(name, weight, "query", query)
    if isinstance(eps, bool) or not isinstance(eps, int | float):
        raise TypeError(f"eps must be a number, got {type(eps).__name__}")
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, got {eps}")
    if not isinstance(grid, tuple | list) or len(grid) != 2:
        raise TypeError(f"grid must be (rows, cols), got {grid!r}")
    rows, cols = grid
    _checks.integer("grid rows", rows, 1)
    _checks.integer("grid cols", cols, 1)
    if tokens % (rows * cols):
        raise ValueError(f"query has {tokens} tokens, not a multiple of rows * cols = {rows} * {cols}")


@_checks.once_per_kind
def _check_written(query: Tensor, value: Tensor, grid: tuple[int, int], pool: Pool, slots: Tensor, query_mean: bool):
    _checks.states("value", value, "[B, L, H, D]")
    _checks.shape("value", value, tuple(query.shape), "[B, L, H, D] like query")
    _checks.same_kind("value", value, "query", query)
    _checks.pool(pool, "query", query)
    rows, cols = grid
    if pool.tokens_per_frame != rows * cols:
        raise ValueError(f"pool has {pool.tokens_per_frame} tokens per slot; grid {rows} x {cols} needs {rows * cols}")
    _checks.of_dtype("slots", slots, torch.int32)
    _checks.shape("slots", slots, (query.shape[1] // (rows * cols),), "[n], one slot per frame")
    _checks.same_device("slots", slots, "query", query)
    if not isinstance(query_mean, bool):
        raise TypeError(f"query_mean must be True or False, got {query_mean!r}")


def _start(start_frame: int | Tensor, query: Tensor) -> tuple[int, Tensor | None]:
    """(start_frame, start): the number where it is known on the host, the tensor where it is not."""
    if isinstance(start_frame, Tensor):
        _checks.of_dtype("start_frame", start_frame, torch.int32, torch.int64)
        if start_frame.numel() != 1:
            raise ValueError(f"start_frame must hold one number, got shape {list(start_frame.shape)}")
        _checks.same_device("start_frame", start_frame, "query", query)
        return 0, start_frame
    _checks.integer("start_frame", start_frame, 0)
    return start_frame, None


def qk_norm_rope(
    query: Tensor,
    key: Tensor,
    *,
    weight_q: Tensor,
    weight_k: Tensor,
    eps: float,
    grid: tuple[int, int],
    start_frame: int | Tensor,
) -> tuple[Tensor, Tensor]:
    """RMS norm of query and key over all heads together, then rotary embedding over (frame, row, column).

    query, key: [B, L, H, D], L whole frames of rows*cols tokens (frame-major, then row, then column), D even;
    weight_q, weight_k: [H*D]; eps: added to the mean square; grid: (rows, cols); start_frame: absolute number of the
    first frame, an int or an int32/int64 tensor of one element on the device (which neither recompiles nor waits).
    Statistics in float32 (float64 for float64); the normalised value is rounded to the dtype, then multiplied by the
    weight. Angles in float64: right at any frame number.
    Returns (query, key), new tensors [B, L, H, D]. Differentiable in query, key and the weights.
    Raises TypeError or ValueError for wrong dtypes, devices, shapes or sizes.
    """
    _check(query, key, weight_q, weight_k, eps, grid)
    first, start = _start(start_frame, query)
    return _qk_norm_rope(query, key, weight_q, weight_k, float(eps), *grid, first, start)


def qk_norm_rope_write(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    weight_q: Tensor,
    weight_k: Tensor,
    eps: float,
    grid: tuple[int, int],
    start_frame: int | Tensor,
    pool: Pool,
    slots: Tensor,
    query_mean: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """qk_norm_rope, with key, value and the mean key of every frame written straight into its slot of the pool.

    Arguments as for qk_norm_rope, and: value: [B, L, H, D]; pool: a Pool of rows*cols tokens per slot, changed in
    place; slots: [n] int32 on the device, n = L / (rows*cols): the slot of each frame, -1 = not stored; no slot twice.
    query_mean: also return the mean of the new queries, which memory_attention chooses frames by.
    Returns the normed and rotated query [B, L, H, D]; with query_mean (query, query_mean), the mean [B, H, D] over all
    L queries, float32 (float64 for float64). Slots that are not named keep their content.
    Raises TypeError or ValueError for wrong dtypes, devices, shapes or sizes, and on the CPU for slots outside the pool
    (on a GPU they are not read on the host); RuntimeError where gradients are asked for: it writes in place.
    """
    _check(query, key, weight_q, weight_k, eps, grid)
    _check_written(query, value, grid, pool, slots, query_mean)
    first, start = _start(start_frame, query)
    _checks.no_gradients("qk_norm_rope_write", query, key, value, weight_q, weight_k, *pool)
    place = (float(eps), *grid, first, start)
    arguments = (query, key, value, weight_q, weight_k, *place, *pool, slots, query_mean)
    new_query, mean = _qk_norm_rope_write(*arguments)
    return (new_query, mean) if query_mean else new_query

"""qk_norm_rope and qk_norm_rope_write: RMS norm over all heads, 3-axis rotary, and the write into the pool."""

from __future__ import annotations

from numbers import Real
from typing import Literal, overload

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
    mean_shape = (query.shape[0], *query.shape[2:]) if rest[13] else (0,)
    return query.new_empty(query.shape), query.new_empty(mean_shape, dtype=statistics_dtype(query.dtype))


_qk_norm_rope = Registered("qk_norm_rope", _fake)
Registered("qk_norm_rope_backward", _fake_backward)
_qk_norm_rope_write = Registered("qk_norm_rope_write", _fake_write)


def _check_each(
    query: Tensor,
    key: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    eps: float,
    grid: tuple[int, int],
    axes: tuple[int, int, int] | None,
    theta: float,
    norm_scope: str,
    normed: bool = False,
) -> None:
    _checks.states("query", query, "[B, L, H, D]")
    _checks.states("key", key, "[B, L, H, D]")
    _checks.shape("key", key, tuple(query.shape), "[B, L, H, D] like query")
    _checks.same_kind("key", key, "query", query)
    _, tokens, heads, head_dim = query.shape
    if head_dim % 2:
        raise ValueError(f"query has head size D = {head_dim}; the rotation turns channel pairs and needs an even one")
    if norm_scope not in ("heads", "head"):
        raise ValueError(f"norm_scope must be 'heads' (all together) or 'head' (each by itself), got {norm_scope!r}")
    together, meaning = (head_dim, "[D]") if norm_scope == "head" else (heads * head_dim, "[H*D]")
    _checks.axes(axes, head_dim)
    _checks.positive("theta", theta)
    if normed:
        if norm_scope != "heads":
            raise ValueError("norm_scope='head' says how to norm; without weight_q and weight_k nothing is normed")
    else:
        _check_norm(query, weight_q, weight_k, eps, together, meaning)
    if not isinstance(grid, tuple | list) or len(grid) != 2:
        raise TypeError(f"grid must be (rows, cols), got {grid!r}")
    rows, cols = grid
    _checks.integer("grid rows", rows, 1)
    _checks.integer("grid cols", cols, 1)
    if tokens % (rows * cols):
        raise ValueError(f"query has {tokens} tokens, not a multiple of rows * cols = {rows} * {cols}")


_check = _checks.once_per_kind(_check_each)


def _check_norm(query: Tensor, weight_q: Tensor, weight_k: Tensor, eps: float, together: int, meaning: str) -> None:
    for name, weight in (("weight_q", weight_q), ("weight_k", weight_k)):
        _checks.of_dtype(name, weight, *SUPPORTED)
        _checks.shape(name, weight, (together,), meaning)
        _checks.same_device(name, weight, "query", query)
    if isinstance(eps, bool) or not isinstance(eps, Real):
        raise TypeError(f"eps must be a number, got {type(eps).__name__}")
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, got {eps}")


@_checks.once_per_kind
def _check_write(value: Tensor, pool: Pool, slots: Tensor, query_mean: bool, query: Tensor, *others) -> None:
    _check_each(query, *others)
    grid = others[4]
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


def _turns(axes: tuple | None, theta: float, norm_scope: str, head_dim: int) -> tuple[list[int] | None, float, bool]:
    """axes, theta and per_head as the operators take them; what Wan has is left to the default."""
    if axes is None:
        return None, float(theta), norm_scope == "head"
    axes = _checks.axes(axes, head_dim)
    return None if axes == _checks.axes(None, head_dim) else list(axes), float(theta), norm_scope == "head"


def qk_norm_rope(
    query: Tensor,
    key: Tensor,
    *,
    weight_q: Tensor,
    weight_k: Tensor,
    eps: float,
    grid: tuple[int, int],
    start_frame: int | Tensor,
    axes: tuple[int, int, int] | None = None,
    theta: float = 10000.0,
    norm_scope: Literal["heads", "head"] = "heads",
) -> tuple[Tensor, Tensor]:
    """RMS norm of query and key, then rotary embedding over (frame, row, column).

    Statistics in float32 (float64 for float64); the normalised value is rounded to the dtype, then multiplied by the
    weight. Angles are exact at any frame number. Differentiable in query, key and the weights. The defaults are those
    of Wan 2.1; the kernels serve these, other values of axes, theta and norm_scope are computed by plain torch.

    Args:
        query: [B, L, H, D], L whole frames of rows * cols tokens (frame by frame, then row by row), D even.
        key: like query.
        weight_q: [H*D]; [D] with norm_scope "head".
        weight_k: like weight_q.
        eps: added to the mean square.
        grid: (rows, cols) of one frame.
        start_frame: number of the first frame, at least 0: an int, or an int32 or int64 tensor of one element on the
            device (which neither recompiles nor waits).
        axes: how many of a head's channels turn with frame, row and column: even numbers that add up to D. None: as
            Wan divides them, (44, 42, 42) for D = 128.
        theta: base of the rotary embedding.
        norm_scope: "heads": the norm is over all heads together, as in Wan; "head": over each by itself.

    Returns:
        (query, key), new tensors [B, L, H, D].

    Raises:
        TypeError, ValueError: for wrong dtypes, devices, shapes or sizes.

    Example:
        >>> import torch
        >>> from memflow_kernels import qk_norm_rope
        >>> query, key, weight = torch.randn(1, 12, 2, 16), torch.randn(1, 12, 2, 16), torch.ones(32)
        >>> new_query, new_key = qk_norm_rope(
        ...     query, key, weight_q=weight, weight_k=weight, eps=1e-6, grid=(2, 3), start_frame=7
        ... )
        >>> new_key.shape  # 2 frames of 2 x 3 tokens
        torch.Size([1, 12, 2, 16])
    """
    _check(query, key, weight_q, weight_k, eps, grid, axes, theta, norm_scope)
    first, start = _start(start_frame, query)
    turns = _turns(axes, theta, norm_scope, query.shape[3])
    return _qk_norm_rope(query, key, weight_q, weight_k, float(eps), *grid, first, start, *turns)


@overload
def qk_norm_rope_write(
    query: Tensor, key: Tensor, value: Tensor, *, weight_q: Tensor, weight_k: Tensor, eps: float, grid: tuple[int, int],
    start_frame: int | Tensor, pool: Pool, slots: Tensor, query_mean: Literal[False] = ...,
    axes: tuple[int, int, int] | None = ..., theta: float = ..., norm_scope: Literal["heads", "head"] = ...,
) -> Tensor: ...  # fmt: skip


@overload
def qk_norm_rope_write(
    query: Tensor, key: Tensor, value: Tensor, *, weight_q: Tensor, weight_k: Tensor, eps: float, grid: tuple[int, int],
    start_frame: int | Tensor, pool: Pool, slots: Tensor, query_mean: Literal[True],
    axes: tuple[int, int, int] | None = ..., theta: float = ..., norm_scope: Literal["heads", "head"] = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def qk_norm_rope_write(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    weight_q: Tensor | None = None,
    weight_k: Tensor | None = None,
    eps: float | None = None,
    grid: tuple[int, int],
    start_frame: int | Tensor,
    pool: Pool,
    slots: Tensor,
    query_mean: bool = False,
    axes: tuple[int, int, int] | None = None,
    theta: float = 10000.0,
    norm_scope: Literal["heads", "head"] = "heads",
) -> Tensor | tuple[Tensor, Tensor]:
    """qk_norm_rope, with key, value and the mean key of every frame written straight into its slot of the pool.

    Slots that are not named keep their content. Heads that are normed already, some of a layer's for example whose norm
    is over all of them, come without weight_q, weight_k and eps: they are rotated and written, nothing else.

    Args:
        query: as for qk_norm_rope.
        key: as for qk_norm_rope.
        value: [B, L, H, D].
        weight_q: as for qk_norm_rope; None, with weight_k and eps: query and key are normed already.
        weight_k: as weight_q.
        eps: as for qk_norm_rope; None without weights.
        grid: as for qk_norm_rope.
        start_frame: as for qk_norm_rope.
        pool: a Pool of rows * cols tokens per slot, changed in place.
        slots: [n] int32 on the device, n = L / (rows * cols): the slot of each frame, -1 = not stored; no slot twice.
        query_mean: also return the mean of the new queries, which memory_attention chooses frames by.
        axes: as for qk_norm_rope.
        theta: as for qk_norm_rope.
        norm_scope: as for qk_norm_rope.

    Returns:
        The normed and rotated query [B, L, H, D]; with query_mean (query, query_mean), the mean [B, H, D] over all L
        queries, float32 (float64 for float64).

    Raises:
        TypeError, ValueError: for wrong dtypes, devices, shapes or sizes, and on the CPU for slots outside the pool (on
            a GPU they are not read on the host).
        RuntimeError: where gradients are asked for, as it writes in place.

    Example:
        >>> import torch
        >>> from memflow_kernels import Pool, qk_norm_rope_write
        >>> query, key, value = (torch.randn(1, 12, 2, 16) for _ in range(3))  # 2 frames of 2 x 3 tokens
        >>> pool, weight = Pool.zeros(1, 4, 6, heads=2, head_dim=16), torch.ones(32)
        >>> new_query = qk_norm_rope_write(
        ...     query, key, value, weight_q=weight, weight_k=weight, eps=1e-6, grid=(2, 3), start_frame=0,
        ...     pool=pool, slots=torch.tensor([3, -1], dtype=torch.int32),
        ... )
        >>> torch.equal(pool.value[:, 18:], value[:, :6])  # slot 3 holds the first frame
        True
    """
    normed = weight_q is None and weight_k is None and eps is None
    if not normed and (weight_q is None or weight_k is None or eps is None):
        given = {"weight_q": weight_q, "weight_k": weight_k, "eps": eps}
        raise ValueError(
            "weight_q, weight_k and eps go together: all of them, or none for heads that are normed already; "
            f"got {', '.join(name for name, x in given.items() if x is not None)}"
        )
    places = (value, pool, slots, query_mean)
    _check_write(*places, query, key, weight_q, weight_k, eps, grid, axes, theta, norm_scope, normed)
    first, start = _start(start_frame, query)
    weights = (weight_q, weight_k) if eps is not None else ()
    _checks.no_gradients("qk_norm_rope_write", query, key, value, *weights, *pool)
    place, turns = (
        (0.0 if eps is None else float(eps), *grid, first, start),
        _turns(axes, theta, norm_scope, query.shape[3]),
    )
    arguments = (query, key, value, weight_q, weight_k, *place, *pool, slots, query_mean, *turns)
    new_query, mean = _qk_norm_rope_write(*arguments)
    return (new_query, mean) if query_mean else new_query

"""Argument checks shared by the ops. Every error names the argument, what came and what is needed.

Shapes, dtypes and devices are checked before an op is called, also while it is traced. The values of index tensors are
checked by the backend, and only on the CPU: on a GPU the host would have to wait for them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from numbers import Integral, Real

import torch
from torch import Tensor

from ..dtypes import SUPPORTED, statistics_dtype
from ..pool import Pool
from ..reference.rotary import wan_axes

MAX_HEAD_DIM = 256


def tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")


def shape(name: str, x: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    """x must have exactly the `expected` shape; `meaning` spells it out, e.g. "[B, F, H, D]"."""
    tensor(name, x)
    if tuple(x.shape) != tuple(expected):
        raise ValueError(f"{name} must be {meaning} = {list(expected)}, got {list(x.shape)}")


def states(name: str, x: Tensor, meaning: str, *, empty_tokens: bool = False) -> None:
    """Queries, keys, values or means: 4 dimensions, a supported dtype, sizes of at least 1, dense last dimension."""
    tensor(name, x)
    if x.dim() != 4:
        raise ValueError(f"{name} must be {meaning}, 4 dimensions, got shape {list(x.shape)}")
    if x.dtype not in SUPPORTED:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}")
    if any(size < 1 for index, size in enumerate(x.shape) if not (empty_tokens and index == 1)):
        raise ValueError(f"{name} must be {meaning} with sizes of at least 1, got shape {list(x.shape)}")
    if x.shape[3] > MAX_HEAD_DIM:
        raise ValueError(f"{name} has head size D = {x.shape[3]}; at most {MAX_HEAD_DIM} is supported")
    if x.shape[3] > 1 and x.stride(3) != 1:
        raise ValueError(f"{name} must have a dense last dimension (stride 1), got stride {x.stride(3)}")


def same_kind(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """The same dtype and device."""
    if x.dtype != other.dtype:
        raise TypeError(f"{name} must have the dtype of {other_name}, {other.dtype}, got {x.dtype}")
    same_device(name, x, other_name, other)


def same_device(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name}, {other.device}, got {x.device}")


def of_dtype(name: str, x: Tensor, *dtypes: torch.dtype) -> None:
    tensor(name, x)
    if x.dtype not in dtypes:
        raise TypeError(
            f"{name} must be {' or '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)}, got {x.dtype}"
        )


def integer(name: str, value: object, at_least: int) -> None:
    """An int, or another whole number such as numpy.int64."""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt | Integral):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value}")


def positive(name: str, value: object) -> None:
    """A finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float | torch.SymFloat | Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be above 0 and finite, got {value}")


def axes(value: object, head_dim: int) -> tuple[int, int, int]:
    """How many of a head's channels turn with frame, row and column; None: as Wan 2.1 divides them."""
    if value is None:
        return wan_axes(head_dim)
    if not isinstance(value, tuple | list) or len(value) != 3:
        raise TypeError(f"axes must be channels per (frame, row, column), got {value!r}")
    for count in value:
        integer("axes", count, 0)
    if any(count % 2 for count in value) or sum(value) != head_dim:
        raise ValueError(f"axes must be even numbers that add up to the head size D = {head_dim}, got {tuple(value)}")
    return tuple(value)


def frame_count(name: str, tokens: int, tokens_per_frame: int) -> int:
    """Number of frames in `tokens` tokens, which must be whole frames."""
    integer("tokens_per_frame", tokens_per_frame, 1)
    if tokens % tokens_per_frame:
        raise ValueError(f"{name} has {tokens} tokens, not a multiple of tokens_per_frame = {tokens_per_frame}")
    return tokens // tokens_per_frame


def block_count(queries: int, query_block: int) -> int:
    """Number of blocks of query_block queries; the last one may be shorter."""
    return -(-queries // query_block)


def scale(value: float | None, head_dim: int) -> float:
    """The given scale, or D^-1/2."""
    if value is None:
        return head_dim**-0.5
    if isinstance(value, bool) or not isinstance(value, int | float | torch.SymFloat | Real):
        raise TypeError(f"scale must be a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"scale must be finite, got {value}")
    return float(value)


def pool(value: object, other_name: str, other: Tensor) -> None:
    """A pool that fits `other` [B, L, H, D] in batch, heads, head size, dtype and device."""
    if not isinstance(value, Pool):
        raise TypeError(f"pool must be a memflow_kernels.Pool, got {type(value).__name__}")
    states("pool.key", value.key, "[B, S*N, H, D]")
    same_kind("pool.key", value.key, other_name, other)
    batch, _, heads, head_dim = other.shape
    shape("pool.key", value.key, (batch, value.key.shape[1], heads, head_dim), "[B, S*N, H, D]")
    pool_parts(value)


def pool_parts(value: Pool) -> None:
    """The parts of a pool fit one another."""
    states("pool.value", value.value, "[B, S*N, H, D]")
    shape("pool.value", value.value, tuple(value.key.shape), "[B, S*N, H, D] like pool.key")
    same_kind("pool.value", value.value, "pool.key", value.key)
    states("pool.frame_mean", value.frame_mean, "[B, S, H, D]")
    batch, tokens, heads, head_dim = value.key.shape
    slots = value.frame_mean.shape[1]
    shape("pool.frame_mean", value.frame_mean, (batch, slots, heads, head_dim), "[B, S, H, D]")
    statistics("pool.frame_mean", value.frame_mean, "pool.key", value.key)
    if tokens % slots:
        raise ValueError(f"pool.key has {tokens} tokens, not a multiple of the {slots} slots of pool.frame_mean")


def statistics(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """float32 (float64 where `other` is float64), on the device of `other`."""
    needed = statistics_dtype(other.dtype)
    if x.dtype != needed:
        raise TypeError(f"{name} must be {needed} for {other_name} in {other.dtype}, got {x.dtype}")
    same_device(name, x, other_name, other)


def no_gradients(op_name: str, *tensors: Tensor) -> None:
    """An op that writes into its arguments cannot be differentiated through."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise RuntimeError(
            f"{op_name} writes into the pool and has no gradient, but an argument requires one: "
            "call it under torch.no_grad(), or use qk_norm_rope, which is differentiable"
        )


VALUES = {int, float, bool, str, type(None)}
_MOST_KINDS = 512  # that a check remembers


def once_per_kind(check: Callable[..., None]) -> Callable[..., None]:
    """Run `check(*arguments)` only for arguments unlike all that it let through before.

    Alike are tensors of one type, shape, dtype, device and strides, and equal values of one type. The check may
    read nothing else, neither a tensor's numbers nor the state of the process. A stream calls an op with arguments of
    the same kind over and over, and recognising a kind costs a fraction of checking it.
    """
    passed: set[tuple] = set()

    @functools.wraps(check)
    def checked(*arguments) -> None:
        if torch.compiler.is_compiling():  # checked while it is traced, and not at all when the graph runs
            return check(*arguments)
        try:
            kinds = _kinds(arguments)
            if kinds in passed:
                return None
        except (TypeError, RuntimeError):  # a list, a symbolic size, a tensor without strides
            return check(*arguments)
        check(*arguments)
        if len(passed) >= _MOST_KINDS:
            passed.clear()
        passed.add(kinds)
        return None

    return checked


def _kinds(arguments: tuple) -> tuple:
    """In one row: the type of each argument says how much of the row is about it."""
    found = []
    for x in arguments:
        kind = type(x)
        if kind in VALUES:
            found += (kind, x)
        elif isinstance(x, Tensor):
            found += (kind, x.shape, x.dtype, x.device, x.stride())  # only a strided layout has strides
        elif isinstance(x, tuple):
            found += (kind, _kinds(x))
        else:
            found += (kind, x)
    return tuple(found)

"""rotate_keys and rotate_keys_write: keys as they are at place 0, turned to a place on the time axis."""

from __future__ import annotations

import torch
from torch import Tensor

from ..pool import Pool
from . import _checks
from .registration import Registered


def _setup_context(ctx, inputs, output):
    _, places, *ctx.sizes = inputs
    ctx.save_for_backward(places)


def _backward(ctx, grad):
    (places,) = ctx.saved_tensors
    return _rotate_keys.recorded(grad.contiguous(), -places, *ctx.sizes), None, None, None, None


_rotate_keys = Registered("rotate_keys", lambda key, *rest: key.new_empty(key.shape), (_setup_context, _backward))
_rotate_keys_write = Registered("rotate_keys_write", lambda *arguments: None)


def _check_turn(channels: int, most: int, theta: float, places: Tensor, other_name: str, other: Tensor) -> None:
    _checks.integer("channels", channels, 2)
    if channels % 2 or channels > most:
        raise ValueError(f"channels must be even, as they turn in pairs, and at most {most}, got {channels}")
    _checks.positive("theta", theta)
    _checks.of_dtype("places", places, torch.int32, torch.int64)
    _checks.same_device("places", places, other_name, other)


def rotate_keys(
    key: Tensor, places: Tensor, *, tokens_per_frame: int, channels: int | None = None, theta: float = 10000.0
) -> Tensor:
    """Turn keys by time: what they are at place 0 becomes what they are at `places`.

    The rotary embedding of `qk_norm_rope` turns some channels with the frame and the others with row and column; a key
    at frame number 0 has had the latter, so that this op moves it to any frame. Mean keys turn alike
    (tokens_per_frame 1). Angles are exact at any place; arithmetic in float32 (float64 for float64). Differentiable in
    key.

    Args:
        key: [B, F*N, H, D], D even, any strides with a dense last dimension.
        places: [F] or [B, F] int32 or int64, on the device of key; may be negative, which turns back.
        tokens_per_frame: N, tokens that share a place.
        channels: how many channels of a head turn, the first ones, in pairs; even. By default those of Wan 2.1:
            D - 4 floor(D / 6).
        theta: base of the rotary embedding; pair i of P turns by place * theta^(-i / P).

    Returns:
        A new tensor like key.

    Raises:
        TypeError, ValueError: for wrong dtypes, devices, shapes or sizes.

    Example:
        >>> import torch
        >>> from memflow_kernels import rotate_keys
        >>> key = torch.randn(1, 6, 2, 16)  # 2 frames of 3 tokens
        >>> moved = rotate_keys(key, torch.tensor([4, 9]), tokens_per_frame=3)
        >>> back = rotate_keys(moved, torch.tensor([-4, -9]), tokens_per_frame=3)
        >>> torch.allclose(back, key, atol=1e-5)
        True
    """
    _checks.states("key", key, "[B, F*N, H, D]", empty_tokens=True)
    frames = _checks.frame_count("key", key.shape[1], tokens_per_frame)
    channels = _checks.axes(None, key.shape[3])[0] if channels is None else channels
    _check_turn(channels, key.shape[3], theta, places, "key", key)
    if places.dim() == 2:
        _checks.shape("places", places, (key.shape[0], frames), "[B, F]")
    else:
        _checks.shape("places", places, (frames,), "[F] or [B, F]")
    return _rotate_keys(key, places, tokens_per_frame, channels, float(theta))


def rotate_keys_write(key: Tensor, frame_mean: Tensor, places: Tensor, *, pool: Pool, theta: float = 10000.0) -> None:
    """Turn stored keys and their means by time and write them into the first slots of a pool.

    As rotate_keys, always from what the keys are at place 0, so that no rounding adds up. Nothing else of the pool
    changes: the channels that do not turn are the same at every place, and values do not turn.

    Args:
        key: [B, S*N, H, C], the channels that turn of every slot's keys, at place 0; C even and at most D.
        frame_mean: [B, S, H, D], the mean keys at place 0; float32 (float64 for float64).
        places: [F] int32 or int64 on the device of key: places of the first F slots, at most S.
        pool: S slots of N tokens, changed in place.
        theta: base of the rotary embedding; pair i of C / 2 turns by place * theta^(-2i / C).

    Raises:
        TypeError, ValueError: for wrong dtypes, devices, shapes or sizes.
        RuntimeError: where gradients are asked for, as it writes in place.

    Example:
        >>> import torch
        >>> from memflow_kernels import Pool, rotate_keys_write
        >>> pool = Pool.zeros(1, 2, 3, heads=2, head_dim=16)
        >>> key, mean = torch.randn(1, 6, 2, 8), torch.randn(1, 2, 2, 16)
        >>> rotate_keys_write(key, mean, torch.tensor([0, 5]), pool=pool)
        >>> torch.equal(pool.key[:, :3, :, :8], key[:, :3])  # at place 0 they are as they were
        True
    """
    _checks.states("key", key, "[B, S*N, H, C]")
    if not isinstance(pool, Pool):
        raise TypeError(f"pool must be a memflow_kernels.Pool, got {type(pool).__name__}")
    _checks.states("pool.key", pool.key, "[B, S*N, H, D]")
    _checks.pool_parts(pool)
    _checks.same_kind("pool.key", pool.key, "key", key)
    _checks.shape("key", key, (*pool.key.shape[:3], key.shape[3]), "[B, S*N, H, C]")
    _checks.states("frame_mean", frame_mean, "[B, S, H, D]")
    _checks.shape("frame_mean", frame_mean, tuple(pool.frame_mean.shape), "[B, S, H, D] like pool.frame_mean")
    _checks.statistics("frame_mean", frame_mean, "key", key)
    _check_turn(key.shape[3], pool.key.shape[3], theta, places, "key", key)
    if places.dim() != 1 or places.shape[0] > pool.slots:
        raise ValueError(f"places must be [F] with F at most the {pool.slots} slots, got shape {list(places.shape)}")
    _checks.no_gradients("rotate_keys_write", key, frame_mean, *pool)
    _rotate_keys_write(key, frame_mean, places, float(theta), pool.key, pool.frame_mean)

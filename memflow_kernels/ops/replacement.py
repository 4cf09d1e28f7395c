"""replace_frame: one remembered frame gives its slot to another, per batch row."""

import torch
from torch import Tensor

from ..pool import Pool
from . import _checks
from .registration import Registered

_replace_frame = Registered("replace_frame", lambda *arguments: None)


def replace_frame(pool: Pool, slot: Tensor, source_slot: Tensor) -> None:
    """Copy one frame of every batch row over another: key, value and frame mean of source_slot[b] go to slot[b].

    One frame moves per row; nothing else is read or written.

    Args:
        pool: a Pool, changed in place.
        slot: [B] int32 on the device of the pool; -1: this row is left as it is.
        source_slot: like slot.

    Raises:
        TypeError, ValueError: for wrong dtypes, devices or shapes, and on the CPU for slots outside the pool (on a GPU
            they are not read on the host).
        RuntimeError: where gradients are asked for, as it writes in place.

    Example:
        >>> import torch
        >>> from memflow_kernels import Pool, replace_frame
        >>> pool = Pool.zeros(2, 3, 4, heads=2, head_dim=8)
        >>> pool.value[:, 8:] = 1.0  # slot 2
        >>> replace_frame(pool, torch.tensor([0, -1], dtype=torch.int32), torch.tensor([2, 2], dtype=torch.int32))
        >>> pool.value[:, 0, 0, 0]
        tensor([1., 0.])
    """
    if not isinstance(pool, Pool):
        raise TypeError(f"pool must be a memflow_kernels.Pool, got {type(pool).__name__}")
    _checks.states("pool.key", pool.key, "[B, S*N, H, D]")
    _checks.pool_parts(pool)
    for name, index in (("slot", slot), ("source_slot", source_slot)):
        _checks.of_dtype(name, index, torch.int32)
        _checks.shape(name, index, (pool.key.shape[0],), "[B]")
        _checks.same_device(name, index, "pool.key", pool.key)
    _checks.no_gradients("replace_frame", *pool)
    _replace_frame(*pool, slot, source_slot)

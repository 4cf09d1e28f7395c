"""replace_frame: one remembered frame gives its slot to another, per batch row."""

import torch
from torch import Tensor

from ..pool import Pool
from . import _checks
from .registration import Registered

_replace_frame = Registered("replace_frame", lambda *arguments: None)


def replace_frame(pool: Pool, slot: Tensor, source_slot: Tensor) -> None:
    """Copy one frame of every batch row over another: key, value and frame mean of source_slot[b] go to slot[b].

    pool: a Pool, changed in place; slot, source_slot: [B] int32 on the device of the pool. A row where either is -1 is
    left as it is. One frame moves per row; nothing else is read or written.
    Raises TypeError or ValueError for wrong dtypes, devices or shapes, and on the CPU for slots outside the pool (on a
    GPU they are not read on the host); RuntimeError where gradients are asked for: it writes in place.
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

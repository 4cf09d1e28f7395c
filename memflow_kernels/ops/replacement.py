"""replace_frame: one remembered frame gives its slot to another, per batch row."""

import torch
from torch import Tensor

from ..backends import dispatch
from ..pool import Pool
from . import _checks
from ._call import call


@torch.library.custom_op("memflow::replace_frame", mutates_args=("pool_key", "pool_value", "pool_frame_mean"))
def _replace_frame(
    pool_key: Tensor, pool_value: Tensor, pool_frame_mean: Tensor, slot: Tensor, source_slot: Tensor
) -> None:
    dispatch("replace_frame", pool_key.device)(pool_key, pool_value, pool_frame_mean, slot, source_slot)


@_replace_frame.register_fake
def _(pool_key, pool_value, pool_frame_mean, slot, source_slot):
    return None


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
    call(_replace_frame, "replace_frame", *pool, slot, source_slot, written=pool)

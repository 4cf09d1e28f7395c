"""What Triton 3.6 and later releases call by different names; everything else of Gluon is imported where it is used."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.blackwell import TensorMemoryLayout, tensor_memory_descriptor
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

# Bulk copy of one tile of a tensor descriptor: (descriptor, coordinates, barrier, tile in shared memory).
load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@gluon.jit
def barriers(count: gl.constexpr):
    """`count` barriers in shared memory, not initialised."""
    return gl.allocate_shared_memory(gl.int64, [count, 1], mbarrier.MBarrierLayout())


if hasattr(tensor_memory_descriptor, "reinterpret"):

    @gluon.jit
    def first_half(tile, dtype: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
        """The memory of the left half of a float32 tile [ROWS, COLUMNS], seen as a tile of 16-bit numbers."""
        LAYOUT: gl.constexpr = TensorMemoryLayout((ROWS, COLUMNS), col_stride=1)
        return tile.slice(0, COLUMNS // 2).reinterpret(dtype, [ROWS, COLUMNS], LAYOUT)

else:

    @gluon.jit
    def first_half(tile, dtype: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
        """The memory of the left half of a float32 tile [ROWS, COLUMNS], seen as a tile of 16-bit numbers."""
        LAYOUT: gl.constexpr = TensorMemoryLayout((ROWS, COLUMNS), col_stride=1)
        return tile.slice(0, COLUMNS // 2)._reinterpret(dtype, [ROWS, COLUMNS], LAYOUT)

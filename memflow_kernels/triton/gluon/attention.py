"""memory_attention by warps with roles of their own: which calls that serves, and its launch."""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .. import configs
from ..attention_schedule import combine, schedule
from ..attention_tiles import LOG2_E
from . import attention_sm90, attention_sm100


def _kernel(device: torch.device) -> tuple[object, int]:
    """The kernel of the chip, and how many queries each of its two groups of warps has."""
    if configs.family(device) == "sm_100":
        return attention_sm100.forward_sm100_kernel, attention_sm100.ROWS.value
    return attention_sm90.forward_sm90_kernel, attention_sm90.ROWS.value


def _described(x: Tensor) -> bool:
    """A descriptor needs a base and strides in whole 16 bytes."""
    size = x.element_size()
    return x.data_ptr() % 16 == 0 and all(stride > 0 and stride * size % 16 == 0 for stride in x.stride()[:3])


def serves(query: Tensor, key: Tensor, value: Tensor, query_block: int | None) -> bool:
    """Whether a call, of a head size with a configuration, is served; others go to the kernel of triton/attention.py.

    Those are float32, tensors that no descriptor describes, and so few queries (of one block) that the second group of
    warps would have none.
    """
    return (
        query.dtype in (torch.bfloat16, torch.float16)
        and min(query_block or query.shape[1], query.shape[1]) > _kernel(query.device)[1]
        and all(_described(x) for x in (query, key, value))
    )


@functools.lru_cache(maxsize=256)
def _form(dtype: torch.dtype, sizes: tuple[int, ...], strides: tuple[int, ...], rows: int) -> TensorDescriptor:
    """A descriptor of no tensor yet: Triton's checks take longer than all else on the host, and are made once."""
    nothing = torch.empty(0, dtype=dtype, device="cpu")
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=len(sizes))
    return TensorDescriptor(nothing, list(sizes), list(strides), [1] * (len(sizes) - 2) + [rows, sizes[-1]], layout)


def _descriptor(x: Tensor, sizes: tuple[int, ...], strides: tuple[int, ...], rows: int) -> TensorDescriptor:
    descriptor = object.__new__(TensorDescriptor)
    vars(descriptor).update(vars(_form(x.dtype, sizes, strides, rows)), base=x)
    return descriptor


def _by_token(x: Tensor, rows: int) -> TensorDescriptor:
    """x [B, L, H, D] by (batch, head, token, channel), in tiles of `rows` tokens; 0 outside."""
    batch, tokens, heads, head_dim = x.shape
    per_batch, per_token, per_head, _ = x.stride()
    return _descriptor(x, (batch, heads, tokens, head_dim), (per_batch, per_head, per_token, 1), rows)


def _by_frame(x: Tensor, tokens_per_frame: int, rows: int) -> TensorDescriptor:
    """The same by (batch, head, frame, token, channel): the end of a frame is an end, too."""
    batch, tokens, heads, head_dim = x.shape
    per_batch, per_token, per_head, _ = x.stride()
    sizes = (batch, heads, tokens // tokens_per_frame, tokens_per_frame, head_dim)
    return _descriptor(x, sizes, (per_batch, per_head, per_token * tokens_per_frame, per_token, 1), rows)


def launch_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    frame_table: Tensor | None,
    tokens_per_frame: int,
    candidate_frames: int,
    scale: float,
    query_block: int | None,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Writes out and lse, contiguous, of a call that is served; arguments as in the reference."""
    batch, queries, heads, head_dim = query.shape
    if frame_table is None:
        frame_table, candidate_frames = torch.empty(0, dtype=torch.int32, device=query.device), 0
    query_block = min(query_block or queries, queries)
    blocks = triton.cdiv(queries, query_block)
    places = frame_table.shape[-1] if candidate_frames else 0
    config = configs.of_family(configs.SPECIALISED, query.device)[head_dim]
    kernel, group_rows = _kernel(query.device)
    rows, tile_rows = config.blocks["BN"], 2 * group_rows
    if scale <= 0:  # the kernel finds the largest logit before it scales
        query, scale = -query, max(-scale, 1e-30)
    units = places * triton.cdiv(tokens_per_frame, rows)
    units += triton.cdiv(key.shape[1] - candidate_frames * tokens_per_frame, rows)
    tiles = batch * heads * blocks * triton.cdiv(query_block, tile_rows)
    whole, pieces = schedule(tiles, max(units, 1), config.resident * configs.multiprocessors(query.device))
    shared = (tiles - whole) * pieces
    partial_out = torch.empty((shared, tile_rows, head_dim), dtype=torch.float32, device=query.device)
    partial_lse = torch.empty((shared, tile_rows), dtype=torch.float32, device=query.device)
    sizes = (queries, heads, query_block, blocks)
    kernel[(whole + shared,)](
        _by_token(query, group_rows),
        _by_frame(key, tokens_per_frame, rows), _by_frame(value, tokens_per_frame, rows),
        _by_token(key, rows), _by_token(value, rows),
        frame_table.contiguous(), out, lse, partial_out, partial_lse,
        scale * LOG2_E, *sizes, places, tokens_per_frame, candidate_frames, key.shape[1], whole, pieces,
        D=head_dim, STAGES=config.stages, PLACES_PAD=max(8, triton.next_power_of_2(max(places, 1))), **config.blocks,
        num_warps=config.warps,
    )  # fmt: skip
    if shared:
        combine(partial_out, partial_lse, out, lse, sizes, tile_rows, tiles, whole, pieces)

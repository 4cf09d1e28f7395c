"""RMS norm over all heads together and rotary embedding over (frame, row, column), as Wan 2.1 defines them."""

from __future__ import annotations

import torch
from einops import repeat
from torch import Tensor

from ..dtypes import statistics_dtype


def wan_axes(head_dim: int) -> tuple[int, int, int]:
    """How many of a head's channels turn with frame, row and column in Wan 2.1: of D / 2 pairs a third, rounded down,
    with the row, as many with the column, and the rest, which come first, with the frame."""
    third = 2 * (head_dim // 6)
    return head_dim - 2 * third, third, third


def inverse_rms(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over `dims`, which stay with size 1; float32 (float64 for float64)."""
    count = 1
    for dim in dims:
        count *= x.shape[dim]
    # vector_norm reads x once; squaring first would write a tensor of its size
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=statistics_dtype(x.dtype))
    return norm.mul_(norm).div_(count).add_(eps).rsqrt_()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm over the last dimension: x [..., C], weight [C].

    Statistics in float32 (float64 for float64); the normalised value is rounded to x.dtype before it is multiplied by
    the weight and rounded again, as the published models do.
    """
    return ((x * inverse_rms(x, (-1,), eps)).to(x.dtype) * weight).to(x.dtype)


def norm_shape(x: Tensor, per_head: bool) -> torch.Size:
    """Shape of what is normed together in x [B, L, H, D]: all heads, or each by itself."""
    return x.shape[-1:] if per_head else x.shape[-2:]


def rms_norm_heads(x: Tensor, weight: Tensor, eps: float, per_head: bool = False) -> Tensor:
    """The same for x [B, L, H, D] of any strides, over all heads together, weight [H*D], or per head, weight [D]."""
    together = norm_shape(x, per_head)
    inverse = inverse_rms(x, tuple(range(-len(together), 0)), eps)
    return (x * inverse).to(x.dtype).mul_(weight.view(together))


def rotation_table(
    head_dim: int,
    frames: int,
    grid: tuple[int, int],
    start_frame: int | Tensor,
    device: torch.device,
    axes: tuple[int, int, int] | None = None,
    theta: float = 10000.0,
) -> Tensor:
    """exp(i angle) of every token and channel pair: complex128 [frames*rows*cols, 1, D/2].

    axes: channels that turn with frame, row and column; wan_axes by default. Pair i of an axis with m pairs turns by
    position * theta^(-i/m). Angles are float64, so that they are right at any frame: float32 would be off by 0.004 rad
    at frame 100,000.
    """
    rows, cols = grid

    def turns(channels: int, position: int | Tensor, size: int) -> Tensor:  # [size, channels / 2]
        index = torch.arange(channels // 2, dtype=torch.float64, device=device)
        speed = theta ** (-index / max(channels // 2, 1))
        angle = (torch.arange(size, dtype=torch.float64, device=device) + position)[:, None] * speed
        return torch.polar(torch.ones_like(angle), angle)

    with_frame, with_row, with_col = axes or wan_axes(head_dim)
    parts = (
        repeat(turns(with_frame, start_frame, frames), "f p -> f r c p", r=rows, c=cols),
        repeat(turns(with_row, 0, rows), "r p -> f r c p", f=frames, c=cols),
        repeat(turns(with_col, 0, cols), "c p -> f r c p", f=frames, r=rows),
    )
    return torch.cat(parts, -1).flatten(0, 2).unsqueeze(1)


def as_pairs(x: Tensor) -> Tensor | None:
    """The channel pairs (2i, 2i+1) of x [..., D] as a complex view [..., D/2]; None where memory does not allow it."""
    if x.dtype not in (torch.float32, torch.float64):
        return None
    try:
        return x.view(torch.complex128 if x.dtype == torch.float64 else torch.complex64)
    except RuntimeError:  # odd strides, or an odd beginning
        return None


def rotate(x: Tensor, table: Tensor, out: Tensor | None = None) -> Tensor:
    """x [B, L, H, D] turned by table [L, 1, D/2], in the precision of the table; written to `out`, which may be x."""
    wide, dtype = x, torch.float64 if table.dtype == torch.complex128 else torch.float32
    if x.dtype != dtype:
        wide = x.to(dtype)
    own = pairs = as_pairs(wide)
    if pairs is None:
        pairs = torch.view_as_complex(wide.contiguous().unflatten(-1, (-1, 2)))
    if out is None:
        return torch.view_as_real(pairs * table).flatten(-2).to(x.dtype)
    if own is not None and wide is not x and out.dtype != dtype:  # turned where it was widened
        torch.mul(own, table, out=own)
        return out.copy_(wide)
    target = as_pairs(out) if out.dtype == dtype else None
    if target is None:
        return out.copy_(torch.view_as_real(pairs * table).flatten(-2))
    torch.mul(pairs, table, out=target)
    return out


def rotate_3d(x: Tensor, grid: tuple[int, int], start_frame: int | Tensor = 0) -> Tensor:
    """Rotary embedding over (frame, row, column): x [B, L, H, D] with L a multiple of rows*cols, D even.

    grid: (rows, cols) of one frame; start_frame: absolute number of the first frame, an int or an integer tensor of one
    element. Angles and arithmetic in float64, then cast back.
    """
    frames = x.shape[1] // (grid[0] * grid[1])
    return rotate(x, rotation_table(x.shape[-1], frames, grid, start_frame, x.device))

"""Norm and rotation as the published system computes them: one step after the other, each through memory."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

POSITIONS = 1024  # the published tables end here


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [B, L, H*D]: statistics in float32, cast back, then times the weight [H*D]."""
    wide = x.double() if x.dtype == torch.float64 else x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return normed.type_as(x) * weight


@functools.cache
def _axis_tables(head_dim: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """exp(i angle) per position for frames, rows and columns: complex128 [1024, pairs of the axis]."""
    pairs = head_dim // 2
    third = pairs // 3
    tables = []
    for count in (pairs - 2 * third, third, third):
        frequency = 10000.0 ** -(torch.arange(count, dtype=torch.float64, device=device) / max(count, 1))
        angle = torch.outer(torch.arange(POSITIONS, dtype=torch.float64, device=device), frequency)
        tables.append(torch.polar(torch.ones_like(angle), angle))
    return tuple(tables)


def complex_table(head_dim: int, frames: int, grid: tuple[int, int], start_frame: int, device: torch.device) -> Tensor:
    """The rotation of every token: complex128 [frames*rows*cols, 1, D/2], put together anew in every call."""
    rows, cols = grid
    by_frame, by_row, by_col = _axis_tables(head_dim, device)
    parts = (
        by_frame[start_frame : start_frame + frames].view(frames, 1, 1, -1).expand(frames, rows, cols, -1),
        by_row[:rows].view(1, rows, 1, -1).expand(frames, rows, cols, -1),
        by_col[:cols].view(1, 1, cols, -1).expand(frames, rows, cols, -1),
    )
    return torch.cat(parts, dim=-1).reshape(frames * rows * cols, 1, -1)


def rotate_complex(x: Tensor, grid: tuple[int, int], start_frame: int) -> Tensor:
    """x [B, L, H, D] turned in float64 complex arithmetic, row by row of the batch, then cast back."""
    tokens = x.shape[1]
    frames = tokens // (grid[0] * grid[1])
    turned = []
    for row in x:
        pairs = torch.view_as_complex(row.to(torch.float64).reshape(tokens, x.shape[2], -1, 2))
        table = complex_table(x.shape[3], frames, grid, start_frame, x.device)
        rotated = torch.view_as_real(pairs * table).flatten(2)
        padding = row[tokens:]  # the published code appends the (empty) padded tail
        turned.append(torch.cat([rotated, padding]))
    return torch.stack(turned).to(x.dtype)

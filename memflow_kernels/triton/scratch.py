"""Chosen frames copied into slots before the window, so that a dense kernel reads them and the window as one view.

Only the chosen frames move (k of them, read and written: 58 MB for 3 of 12 heads x 128 and 1560 tokens), where
gathering into memory of its own moves the window as well (230 MB). The slots are scratch of the caller's pool, which
lies `[ candidates | k scratch slots | window ]`: whoever owns the pool gives them, and an op over it would name them
as what it overwrites.
"""

from __future__ import annotations

from torch import Tensor

from .attention import launch_forward
from .gather import gather_into
from .vendor import attend_dense


def attend_beside_window(
    kernel: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    frame_table: Tensor,
    tokens_per_frame: int,
    candidate_frames: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """out [B, Lq, H, D] and lse [B, H, Lq] of the frames that frame_table [B, H, k] names and of the window.

    key, value: [B, (candidate_frames + k + W)*N, H, D]. The k frames behind the candidates are overwritten, and nothing
    else is. kernel: "cudnn" or "flash" of torch.
    """
    chosen = frame_table.shape[-1]
    first, window = candidate_frames * tokens_per_frame, (candidate_frames + chosen) * tokens_per_frame
    candidates = (part[:, :first] for part in (key, value))
    scratch = (part[:, first:window] for part in (key, value))
    gather_into(*candidates, frame_table, tokens_per_frame, candidate_frames, *scratch)
    out, lse = attend_dense(kernel, query, key[:, first:], value[:, first:], scale)
    # zeros in an empty place are keys too: heads that have one are done again, in place. To this launch the scratch
    # slots are candidates that no table names.
    sizes = (frame_table, tokens_per_frame, candidate_frames + chosen, scale, None)
    launch_forward(query, key, value, *sizes, out, lse, only_incomplete=True)
    return out, lse

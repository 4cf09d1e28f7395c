"""The attention masks that causal video generators are trained with, as tables of frames for memory_attention.

They hide whole frames, so that a table names what is seen and nothing of the mask is ever stored per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .ops import _checks


def block_causal_table(
    frames: int,
    frames_per_block: int,
    *,
    local: int | None = None,
    sink: int = 0,
    first_block: int | None = None,
    teacher_forcing: bool = False,
    batch: int = 1,
    heads: int = 1,
    device: torch.device | str | None = None,
) -> Tensor:
    """The frames that the queries of every frame see under a block-causal mask.

    Frames are cut into blocks; inside a block they see each other, and every block sees the blocks before it.
    The table goes to `memory_attention(..., candidate_frames=table.shape[2], frame_table=table,
    query_block=tokens_per_frame)`.

    Args:
        frames: number of latent frames F of the video, at least 1; with teacher_forcing of each half.
        frames_per_block: frames that are denoised together, at least 1; the last block may be shorter.
        local: number of frames that a block sees, its own included, counted back from its end; at least
            frames_per_block and first_block. None: all.
        sink: number of first frames that every later block sees besides those.
        first_block: frames of the first block where it differs from the others (1 for image to video).
        teacher_forcing: the sequence is the clean video and then the noisy one, 2F frames. Clean frames see clean
            frames as above. Noisy frames see their own noisy block, and of the clean video what comes before it.
        batch: batch rows B of the table.
        heads: heads H of the table.
        device: where the table is made; torch's default device by default.

    Returns:
        [B, H, F or 2F, n] int32: row i holds the frames that frame i sees, ascending, then -1. Batch rows and heads
        share their memory.

    Raises:
        TypeError, ValueError: for numbers that are no int, or too small, and for a sink without local.

    Source: the masks of CausVid (arXiv 2412.07772), Self Forcing (2506.08009) and LongLive (2509.22622).

    Example:
        >>> block_causal_table(4, 2)[0, 0].tolist()
        [[0, 1, -1, -1], [0, 1, -1, -1], [0, 1, 2, 3], [0, 1, 2, 3]]
        >>> block_causal_table(4, 1, local=2, sink=1)[0, 0].tolist()
        [[0, -1, -1], [0, 1, -1], [0, 1, 2], [0, 2, 3]]
        >>> block_causal_table(2, 1, teacher_forcing=True)[0, 0].tolist()
        [[0, -1], [0, 1], [2, -1], [0, 3]]
    """
    first = frames_per_block if first_block is None else first_block
    for name, value, least in (
        ("frames", frames, 1),
        ("frames_per_block", frames_per_block, 1),
        ("first_block", first, 1),
        ("sink", sink, 0),
        ("batch", batch, 1),
        ("heads", heads, 1),
    ):
        _checks.integer(name, value, least)
    if local is not None:
        _checks.integer("local", local, max(frames_per_block, first))
    elif sink:
        raise ValueError(f"sink has no effect without local, which hides frames: got sink = {sink} and local = None")
    rows, noisy = [], []
    for frame in range(frames):
        start = 0 if frame < first else first + (frame - first) // frames_per_block * frames_per_block
        stop = min(start + frames_per_block if start else first, frames)
        oldest = 0 if local is None else max(0, stop - local)
        past = [*range(min(sink, oldest)), *range(oldest, start)]
        rows.append([*past, *range(start, stop)])
        noisy.append([*past, *range(frames + start, frames + stop)])
    if teacher_forcing:
        rows += noisy
    places = max(map(len, rows))
    table = torch.tensor([row + [-1] * (places - len(row)) for row in rows], dtype=torch.int32, device=device)
    return table.expand(batch, heads, -1, -1)

"""What the compiled kernels do not serve. Such a call runs on the backend that would run without them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import extension

MOST_CANDIDATES = 12288  # select_frames: the scores of one head lie in shared memory
MOST_COVERED = 12287  # cover_frames: what a row's tokens and frames take of shared memory
MOST_CHANNELS = 8192  # qk_norm_rope_write: one block holds a token of all heads
HALF = (torch.bfloat16, torch.float16)
HEAD_SIZES = (64, 128)


def _memory_attention(query: Tensor, key: Tensor, *_: object) -> str | None:
    if 0 in query.shape or 0 in key.shape:
        return "it takes at least one query and one frame"
    if query.dtype in HALF and query.shape[3] in HEAD_SIZES:
        return None
    return f"it takes bfloat16 and float16 with head size D = 64 or 128, not {query.dtype} with D = {query.shape[3]}"


def _select_frames(query: Tensor, frame_mean: Tensor, *_: object) -> str | None:
    frames = frame_mean.shape[1]
    return f"it takes up to {MOST_CANDIDATES} candidates, not {frames}" if frames > MOST_CANDIDATES else None


def _qk_norm_rope_write(query: Tensor, *rest: object) -> str | None:
    if len(rest) > 14:  # axes, theta and norm_scope are left out of a call where they have their defaults
        return "it takes the axes, theta and norm_scope of Wan alone"
    channels = query.shape[2] * query.shape[3]
    return f"it takes up to {MOST_CHANNELS} channels H*D, not {channels}" if channels > MOST_CHANNELS else None


def _cover_frames(scores: Tensor, *_: object) -> str | None:
    tokens, frames = scores.shape[1:]
    needed = 2 * tokens + 9 * frames
    return f"it takes 2 T + 9 F up to {MOST_COVERED}, not {needed}" if needed > MOST_COVERED else None


def _any(*_: object) -> None:
    return None


# op -> its own limits. An op that is not named here has no compiled kernel.
LIMITS: dict[str, Callable[..., str | None]] = {
    "cover_frames": _cover_frames,
    "frame_means": _any,
    "memory_attention": _memory_attention,
    "prompt_relevance_mean": _any,
    "prompt_relevance_softmax": _any,
    "prompt_relevance_token": _any,
    "qk_norm_rope_write": _qk_norm_rope_write,
    "replace_frame": _any,
    "select_frames": _select_frames,
}


def unserved(op_name: str, *arguments: object) -> str | None:
    """Why the compiled kernels do not run this call; None where they do. May build and load them.

    op_name, arguments: as a backend is called, see memflow_kernels.reference; the first argument is a tensor.
    """
    if op_name not in LIMITS:
        return f"{op_name} has no compiled kernel"
    if any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in arguments):
        return "float64, which is there to check results, is computed by torch"
    reason = LIMITS[op_name](*arguments)
    return reason or extension.unloadable() or extension.not_compiled_for(arguments[0].device.index)

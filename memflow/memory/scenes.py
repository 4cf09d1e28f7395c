"""Of the held frames of one scene, one is preferred: the first, or the latest where looks are meant to change."""

from __future__ import annotations

import torch
from torch import Tensor


def passed_over(frames: Tensor, scene: Tensor, preferred: str) -> Tensor:
    """[layers, B, n] bool: True where another held frame of the same scene is preferred.

    Args:
        frames: [layers, B, n] int64, numbers of the held frames.
        scene: [layers, B, n] int64, numbers of their scenes, from 0 on.
        preferred: "first" or "latest".
    """
    reduce, worst = ("amin", torch.iinfo(torch.int64).max) if preferred == "first" else ("amax", -1)
    best = frames.new_full((*frames.shape[:2], scene.shape[-1]), worst)
    rank = _dense(scene)
    best = best.scatter_reduce(-1, rank, frames, reduce)
    return frames != best.gather(-1, rank)


def _dense(scene: Tensor) -> Tensor:
    """Scene numbers [layers, B, n] as ranks 0 to n - 1, equal for equal numbers; nothing is read on the host."""
    ordered, order = scene.sort(-1)
    new = torch.zeros_like(ordered)
    new[..., 1:] = (ordered[..., 1:] != ordered[..., :-1]).long()
    return torch.empty_like(scene).scatter(-1, order, new.cumsum(-1))

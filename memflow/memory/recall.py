"""Which of the held frames the bank shows: a set that covers the prompt, and the preferred frame of each scene.

Relevance adds up what all tokens of a prompt say of one frame, and frames of one kind may take all places: six of the
place, none of the character. A set covers a prompt where each token finds a frame in it that answers that token well
(greedy maximum coverage; Nemhauser, Wolsey, Fisher 1978, show what greed loses).
"""

from __future__ import annotations

import torch
from torch import Tensor

from memflow.memory.policies import PASSED_OVER, Held
from memflow_kernels import cover_frames

# Of relevance, beside coverage: it decides once all tokens are covered. Ten times as much brings the fault back.
RELEVANCE_SHARE = 0.03


def cover(held: Held, k: int) -> Tensor:
    """The frames that cover the coming prompt together.

    Args:
        held: what is held.
        k: how many are shown, at most as many as are held.

    Returns:
        [layers, B, k] indices into the held frames, the most wanted first.
    """
    scores = held.token_relevance()
    prior = RELEVANCE_SHARE * held.relevance()
    if held.passed_over is not None:
        prior = prior - PASSED_OVER * held.passed_over()
    prior = prior.nan_to_num(nan=-2 * PASSED_OVER)  # a frame that was made of NaN comes last
    layers = scores.shape[0]
    if scores.stride(0) == 0:  # the layers have voted: one choice is that of all
        scores, prior = scores[:1], prior[:1]
    weights = held.token_weight.repeat(len(scores), 1)
    chosen = cover_frames(scores.flatten(0, 1), weights, k, prior.flatten(0, 1))
    return chosen.long().unflatten(0, scores.shape[:2]).expand(layers, -1, -1)


def passed_over(frames: Tensor, scene: Tensor, preferred: str) -> Tensor:
    """[layers, B, n] bool: True where another held frame of the same scene is preferred.

    Args:
        frames: [layers, B, n] int64, numbers of the held frames.
        scene: [layers, B, n] int64, numbers of their scenes, from 0 on.
        preferred: "first" or "latest".
    """
    reduce, worst = ("amin", torch.iinfo(torch.int64).max) if preferred == "first" else ("amax", -1)
    # A scene has at least one frame of its own, so that its number is at most that of a frame.
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

"""Which of the held frames the bank shows: a set that covers the prompt, and in it each thing as it was seen first.

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
# How far from the worst to the best frame for a token one must be that answers it. With 1/2, frames of something else
# do; with 0.8, some originals no longer do.
ANSWERS = 2 / 3
# Against relevance, beside originals: it only decides which frames fill up the bank.
REST_SHARE = 0.003


def cover(held: Held, k: int) -> Tensor:
    """The frames that cover the coming prompt together.

    Args:
        held: what is held.
        k: how many are shown, at most as many as are held.

    Returns:
        [layers, B, k] indices into the held frames, the most wanted first.
    """
    prior = RELEVANCE_SHARE * held.relevance()
    if held.passed_over is not None:
        prior = prior - PASSED_OVER * held.passed_over()
    return _greedily(held, _token_relevance(held), prior, k)


def originals(held: Held, k: int) -> Tensor:
    """As `cover`, but of the frames that answer a token only the oldest counts for it: the original, of which the later
    ones are copies.

    Places that are left over show the same originals again, each as often as what it adds to the cover calls for
    (highest averages: D'Hondt 1878). A copy there would be drawn from as the original is, and the model draws what lies
    between the two; an original that is shown twice weighs more against the window, in which a look drifts. Where heads
    choose what they attend to, the same frame twice would leave them less to choose from: then the places show what the
    prompt calls for least.
    """
    scores = _token_relevance(held)
    known = ~scores.isnan()
    worst = scores.where(known, torch.inf).amin(-1, keepdim=True)
    best = scores.where(known, -torch.inf).amax(-1, keepdim=True)
    answers = scores >= worst + ANSWERS * (best - worst)
    frames = held.frames[: len(scores)].unsqueeze(2)
    oldest = frames.where(answers, torch.iinfo(frames.dtype).max).amin(-1, keepdim=True)
    scores = scores.where(frames == oldest, worst)
    chosen = _greedily(held, scores, -REST_SHARE * held.relevance(), k)
    return _shared_out(chosen, _added(held, scores, worst, chosen)) if held.all_seen else chosen


def _added(held: Held, scores: Tensor, worst: Tensor, chosen: Tensor) -> Tensor:
    """[layers, B, k]: what each of the chosen frames adds to the cover by those before it."""
    index = chosen[: len(scores)].unsqueeze(2).expand(-1, -1, scores.shape[2], -1)
    covered = scores.gather(-1, index).cummax(-1).values  # [1 or layers, B, T, k]
    rises = covered.diff(dim=-1, prepend=worst) * held.token_weight.unsqueeze(-1)
    return rises.nan_to_num(nan=0.0).sum(2).expand_as(chosen)


def _shared_out(chosen: Tensor, added: Tensor) -> Tensor:
    """k places among the chosen [layers, B, k] by what each has added [layers, B, k]: whoever added something has one,
    the others go one by one to the highest of added / (places so far + 1)."""
    k = chosen.shape[-1]
    average = added.unsqueeze(-2) / torch.arange(1, k + 1, device=added.device).unsqueeze(-1)  # [..., place, frame]
    average[..., 0, :].masked_fill_(added > 0, torch.inf)
    order = average.flatten(-2).argsort(dim=-1, descending=True, stable=True)  # nothing adds: each once
    return chosen.gather(-1, order[..., :k] % k)


def _token_relevance(held: Held) -> Tensor:
    """[layers, B, T, n]; layers is 1 where they have voted: one choice is that of all."""
    scores = held.token_relevance()
    return scores[:1] if scores.stride(0) == 0 else scores


def _greedily(held: Held, scores: Tensor, prior: Tensor, k: int) -> Tensor:
    """scores: [1 or layers, B, T, n]. prior: [layers, B, n]."""
    prior = prior[: len(scores)].nan_to_num(nan=-2 * PASSED_OVER)  # a frame that was made of NaN comes last
    weights = held.token_weight.to(scores.dtype).repeat(len(scores), 1)
    chosen = cover_frames(scores.flatten(0, 1), weights, k, prior.flatten(0, 1))
    return chosen.long().unflatten(0, scores.shape[:2]).expand(len(held.frames), -1, -1)


CHOICES = {"coverage": cover, "originals": originals}  # by the names of MemoryConfig.recall

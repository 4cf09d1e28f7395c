"""Which of the held frames the bank shows: a set that covers the prompt, and the preferred frame of each scene.

Relevance adds up what all tokens of a prompt say of one frame, and frames of one kind may take all places: six of the
place, none of the character. A set covers a prompt where each token finds a frame in it that answers that token well
(greedy maximum coverage; Nemhauser, Wolsey, Fisher 1978, show what greed loses).
"""

from __future__ import annotations

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
    weights = held.token_weight.to(scores.dtype).repeat(len(scores), 1)
    chosen = cover_frames(scores.flatten(0, 1), weights, k, prior.flatten(0, 1))
    return chosen.long().unflatten(0, scores.shape[:2]).expand(layers, -1, -1)

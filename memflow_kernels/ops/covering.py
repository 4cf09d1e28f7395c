"""cover_frames: the frames that together score high for every token."""

import torch
from torch import Tensor

from ..dtypes import SUPPORTED
from . import _checks
from .registration import Registered


def _fake(scores, weights, k, prior):
    return scores.new_empty((scores.shape[0], min(k, scores.shape[2])), dtype=torch.int32)


_cover_frames = Registered("cover_frames", _fake)


@_checks.once_per_kind
def _check(scores: Tensor, weights: Tensor, k: int, prior: Tensor) -> None:
    _checks.of_dtype("scores", scores, *SUPPORTED)
    if scores.dim() != 3:
        raise ValueError(f"scores must be [R, T, F], 3 dimensions, got shape {list(scores.shape)}")
    rows, tokens, frames = scores.shape
    _checks.shape("weights", weights, (rows, tokens), "[R, T]")
    _checks.statistics("weights", weights, "scores", scores)
    _checks.integer("k", k, 0)
    _checks.shape("prior", prior, (rows, frames), "[R, F]")
    _checks.statistics("prior", prior, "scores", scores)


def cover_frames(scores: Tensor, weights: Tensor, k: int, prior: Tensor) -> Tensor:
    """The k frames that together score high for every token: greedy, each the one that adds most to those before it.

    A token starts at its lowest score among the frames. A frame adds what it raises the tokens by, each times its
    weight, and its prior; the one that adds most is chosen, the tokens rise to its scores, and so on. Of equal frames
    the lower index is chosen. The choice has no gradient.

    Args:
        scores: [R, T, F], of every token for every frame, such as prompt_relevance(..., aggregate="token"). NaN and
            -inf: the frame does nothing for the token. +inf counts as the largest number.
        weights: [R, T], float32 (float64 for float64): what a token counts, above 0. One of 0 or less, or NaN, does
            not count, whatever its scores are.
        k: at least 0.
        prior: [R, F], float32 (float64 for float64): what a frame adds whatever is chosen. -inf or NaN: never chosen,
            its scores are not looked at.

    Returns:
        [R, min(k, F)] int32, in the order of being chosen, so that fewer frames are the first ones of more. Places that
        no frame fills are -1, at the end. Without tokens the prior alone decides.

    Raises:
        TypeError, ValueError: for wrong dtypes, devices or shapes, or k < 0.

    Source: the greedy algorithm for facility location, within 1 - 1/e of the best set where no prior is below 0
    (Nemhauser, Wolsey and Fisher 1978).

    Example:
        >>> import torch
        >>> from memflow_kernels import cover_frames
        >>> scores = torch.tensor([[[5.0, 4.0, 0.0], [0.0, 1.0, 2.0]]])  # two tokens, three frames
        >>> cover_frames(scores, torch.full((1, 2), 0.5), k=2, prior=torch.zeros(1, 3))
        tensor([[0, 2]], dtype=torch.int32)
    """
    _check(scores, weights, k, prior)
    return _cover_frames(scores.detach(), weights.detach(), k, prior.detach())

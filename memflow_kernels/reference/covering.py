"""cover_frames: the frames that together score high for every token."""

import torch
from torch import Tensor

from ..dtypes import statistics_dtype


def cover_frames(scores: Tensor, weights: Tensor, k: int, prior: Tensor) -> Tensor:
    """scores [R, T, F], weights [R, T], prior [R, F] -> [R, min(k, F)] int32 in the order of being chosen."""
    rows, _, frames = scores.shape
    table = torch.full((rows, min(k, frames)), -1, dtype=torch.int32, device=scores.device)
    wide = statistics_dtype(scores.dtype)
    most = torch.finfo(wide).max
    free = prior > -torch.inf  # [R, F], False for NaN too
    weights = weights.clamp(max=most).unsqueeze(1)  # [R, 1, T]
    # [R, F, T]: the sum over tokens is then the same for all frames, so that equal frames have equal gains
    scores = scores.to(wide).mT.contiguous().nan_to_num(nan=-torch.inf, posinf=most, neginf=-torch.inf)
    known = free.unsqueeze(2) & (scores > -torch.inf)
    best = scores.masked_fill(~known, most).amin(1, keepdim=True) if frames else scores  # [R, 1, T]
    for place in range(table.shape[1]):
        gain = (weights * (scores - best).clamp_(min=0)).masked_fill_(~(weights > 0), 0.0).sum(-1)
        worth = (gain + prior).masked_fill(~free, -torch.inf)  # [R, F]
        chosen = worth.argmax(1, keepdim=True)
        table[:, place] = torch.where(free.gather(1, chosen), chosen, -1).squeeze(1)
        best = best.maximum(scores.take_along_dim(chosen.unsqueeze(2), 1))
        free = free.scatter(1, chosen, False)
    return table

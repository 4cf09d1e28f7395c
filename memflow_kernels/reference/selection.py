"""select_frames: the candidate frames that each head attends to."""

import torch
from torch import Tensor

from ..dtypes import statistics_dtype


def select_frames(query: Tensor, frame_mean: Tensor, top_k: int, valid: Tensor | None) -> Tensor:
    """query [B, Lq, H, D], frame_mean [B, F, H, D], valid [B, F] -> [B, H, min(top_k, F)] int32."""
    frames = frame_mean.shape[1]
    wide = statistics_dtype(query.dtype)
    mean_query = query.mean(1, dtype=wide)  # [B, H, D]
    score = torch.einsum("bhd,bfhd->bhf", mean_query, frame_mean.to(wide))
    if valid is not None:
        score = score.masked_fill(~valid[:, None], -torch.inf)
    order = score.sort(dim=-1, descending=True, stable=True).indices  # stable: of equal scores, the lower index
    chosen = order[..., :top_k]
    if valid is not None:
        usable = valid[:, None].expand(-1, score.shape[1], -1).gather(-1, chosen)
        chosen = chosen.masked_fill(~usable, frames)  # past the last index, so that empty places sort to the end
    chosen = chosen.sort(dim=-1).values
    return chosen.masked_fill(chosen == frames, -1).to(torch.int32)

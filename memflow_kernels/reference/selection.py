"""select_frames: the candidate frames that each head attends to."""

import torch
from torch import Tensor

from ..choosing import best_of_few
from ..dtypes import statistics_dtype
from .means import frame_means

PRODUCTS = 2**22  # of queries and frames that exist at a time
FEW = 256  # scores that the host sorts sooner than torch's operators


def mean_queries(query: Tensor, query_block: int) -> Tensor:
    """query [B, Lq, H, D] -> [B, blocks, H, D] means of every query_block tokens; the last block may be shorter."""
    if query_block == query.shape[1] and query.dtype == statistics_dtype(query.dtype):
        return query.mean(1, keepdim=True)
    whole = query.shape[1] // query_block * query_block
    if whole == query.shape[1]:
        return frame_means(query, query_block)
    means = frame_means(query[:, :whole], query_block) if whole else None
    rest = frame_means(query[:, whole:], query.shape[1] - whole)
    return rest if means is None else torch.cat([means, rest], 1)


def scores(mean_query: Tensor, frame_mean: Tensor) -> Tensor:
    """mean_query [B, blocks, H, D], frame_mean [B, F, H, D] -> [B, H, blocks, F].

    Products and sums of their own instead of a matrix product, which adds up some columns in another order than others:
    equal frames must have equal scores.
    """
    queries, means = mean_query.transpose(1, 2).unsqueeze(3), frame_mean.transpose(1, 2).unsqueeze(2)
    at_a_time = max(PRODUCTS // queries.numel(), 1) if queries.numel() else 1
    if means.shape[3] <= at_a_time:
        return (queries * means).sum(-1)
    return torch.cat([(queries * some).sum(-1) for some in means.split(at_a_time, 3)], -1)


def select_frames(
    query: Tensor, frame_mean: Tensor, top_k: int, valid: Tensor | None, query_block: int | None
) -> Tensor:
    """query [B, Lq, H, D], frame_mean [B, F, H, D], valid [B, F] -> [B, H, k = min(top_k, F)] int32.

    With query_block: [B, H, blocks, k], a choice for every query_block queries.
    """
    frames = frame_mean.shape[1]
    mean_query = mean_queries(query, query.shape[1] if query_block is None else query_block)
    score = scores(mean_query, frame_mean)
    if valid is not None:
        valid = valid[:, None, None]  # [B, 1, 1, F]
        score = score.masked_fill(~valid, -torch.inf)
    elif score.device.type == "cpu" and score.numel() <= FEW:
        best = best_of_few(score.flatten(0, 2).tolist(), top_k)
        if best is not None:
            table = torch.tensor(best, dtype=torch.int32, device=score.device).view(*score.shape[:3], -1)
            return table.squeeze(2) if query_block is None else table
    order = score.sort(dim=-1, descending=True, stable=True).indices  # stable: of equal scores, the lower index
    table = order[..., :top_k].to(torch.int32)
    if valid is not None:
        usable = valid.expand_as(score).gather(-1, order[..., :top_k])
        table = table.masked_fill(~usable, frames)  # past the last index, so that empty places sort to the end
    table = table.sort(dim=-1).values
    if valid is not None:
        table = table.masked_fill(table == frames, -1)
    return table.squeeze(2) if query_block is None else table

"""memory_attention: exact attention over the frames a head chose and over the frames always attended to."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dtypes import statistics_dtype
from .merge import merge_attention

KEYS_PER_BLOCK = 2048  # keeps the logits of the plain path small: [B, H, Lq, 2048]


def _attend_fused(
    query: Tensor, key: Tensor, value: Tensor, scale: float, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention with log-sum-exp by torch's fused CPU kernel, which reads strided views in place."""
    if bias is not None:
        bias = bias.to(query.dtype).expand(-1, -1, query.shape[1], -1)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=bias, scale=scale
    )
    return out.transpose(1, 2), lse


def _attend_plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    bias: Tensor | None,
    keys_per_block: int = KEYS_PER_BLOCK,
) -> tuple[Tensor, Tensor]:
    """The same in plain products, a block of keys at a time, in float32 (float64 for float64)."""
    wide = statistics_dtype(query.dtype)
    scaled = query.transpose(1, 2).to(wide) * scale  # [B, H, Lq, D]
    out = lse = None
    for start in range(0, key.shape[1], keys_per_block):
        block = slice(start, start + keys_per_block)
        logits = scaled @ key[:, block].permute(0, 2, 3, 1).to(wide)  # [B, H, Lq, block]
        if bias is not None:
            logits = logits + bias[..., block]
        block_lse = logits.logsumexp(-1)
        finite = block_lse.masked_fill(block_lse == -torch.inf, 0.0)
        share = torch.exp(logits - finite.unsqueeze(-1))
        block_out = (share @ value[:, block].transpose(1, 2).to(wide)).transpose(1, 2)
        if out is None:
            out, lse = block_out, block_lse
        else:
            out, lse = merge_attention(out, lse, block_out, block_lse)
    return out.to(query.dtype), lse


def attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """query [B, Lq, H, D], key and value [B, Lk, H, D], bias [B, H, 1, Lk] -> out [B, Lq, H, D], lse [B, H, Lq]."""
    return (_attend_fused if query.device.type == "cpu" else _attend_plain)(query, key, value, scale, bias)


def _attend_chosen(
    query: Tensor, key: Tensor, value: Tensor, frame_table: Tensor, tokens_per_frame: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention over the frames that frame_table [B, H, n] names, gathered per head; -1 is an empty place."""
    batch, heads, _ = frame_table.shape
    rows = torch.arange(batch, device=query.device)[:, None, None]
    columns = torch.arange(heads, device=query.device)[:, None]
    index = frame_table.clamp(min=0).long()

    def gather(states: Tensor) -> Tensor:  # [B, n*N, H, D], a view of [B, H, n, N, D]
        frames = states.unflatten(1, (-1, tokens_per_frame)).permute(0, 3, 1, 2, 4)  # [B, H, F, N, D]
        return frames[rows, columns, index].flatten(2, 3).transpose(1, 2)

    empty = frame_table < 0
    if query.device.type == "cpu" and not empty.any():
        return attend(query, gather(key), gather(value), scale)
    bias = torch.zeros(empty.shape, dtype=statistics_dtype(query.dtype), device=query.device)
    bias = bias.masked_fill(empty, -torch.inf).repeat_interleave(tokens_per_frame, -1).unsqueeze(2)  # [B, H, 1, n*N]
    nothing = bias.isinf().permute(0, 3, 1, 2)  # [B, n*N, H, 1]: frame 0 stands in, and may hold anything
    keys, values = (gather(x).masked_fill(nothing, 0.0) for x in (key, value))
    out, lse = attend(query, keys, values, scale, bias)
    return out, lse.masked_fill(empty.all(-1, keepdim=True), -torch.inf)


def _attend_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    frame_table: Tensor,
    tokens_per_frame: int,
    scale: float,
    query_block: int,
) -> tuple[Tensor, Tensor]:
    """The same where every query_block queries have a table of their own: frame_table [B, H, blocks, n]."""
    parts = [
        _attend_chosen(queries, key, value, table, tokens_per_frame, scale)
        for queries, table in zip(query.split(query_block, dim=1), frame_table.unbind(2), strict=True)
    ]
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs, 1), torch.cat(lses, 2)


def _check_table(frame_table: Tensor, candidate_frames: int) -> None:
    if frame_table.device.type == "cpu" and frame_table.numel():
        low, high = (int(bound) for bound in torch.aminmax(frame_table))
        if low < -1 or high >= candidate_frames:
            raise ValueError(
                f"frame_table holds {low} to {high}: each place must be -1 (empty) or the index of a candidate frame, "
                f"below candidate_frames = {candidate_frames}"
            )


def memory_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    frame_table: Tensor | None,
    tokens_per_frame: int,
    candidate_frames: int,
    scale: float,
    query_block: int | None,
) -> tuple[Tensor, Tensor]:
    """query [B, Lq, H, D], key and value [B, F*N, H, D], frame_table [B, H, n] -> out [B, Lq, H, D], lse [B, H, Lq].

    With query_block the table is [B, H, blocks, n].
    Without a table every frame is attended to, by one call on the views. With one, the frames from candidate_frames on
    are attended to where they lie; only what a head chose is gathered, and the two parts are merged by their mass.
    """
    if frame_table is None:
        out, lse = attend(query, key, value, scale)
        return out.contiguous(), lse.contiguous()
    _check_table(frame_table, candidate_frames)
    candidates = candidate_frames * tokens_per_frame
    parts = []
    if frame_table.shape[-1] and candidates:
        chosen = (query, key[:, :candidates], value[:, :candidates], frame_table, tokens_per_frame, scale)
        parts.append(_attend_chosen(*chosen) if query_block is None else _attend_blocks(*chosen, query_block))
    if candidates < key.shape[1]:
        parts.append(attend(query, key[:, candidates:], value[:, candidates:], scale))
    if not parts:
        out = torch.zeros_like(query, memory_format=torch.contiguous_format)
        lse_shape = (query.shape[0], query.shape[2], query.shape[1])
        return out, query.new_full(lse_shape, -torch.inf, dtype=statistics_dtype(query.dtype))
    out, lse = parts[0] if len(parts) == 1 else merge_attention(*parts[0], *parts[1])
    return out.contiguous(), lse.contiguous()


def memory_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    frame_table: Tensor | None,
    tokens_per_frame: int,
    candidate_frames: int,
    scale: float,
    query_block: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; the choice of frames counts as constant.

    One frame at a time, each weighted by how often a head's table names it: nothing is gathered or scattered, so that
    the sums are always taken in the same order. With p = exp(logit - lse): d logit = p (<dO, v> - <dO, O> + d lse).
    """
    wide = statistics_dtype(query.dtype)
    heads_first = (query, grad_out, out)
    queries, grads, outs = (states.transpose(1, 2).to(wide) for states in heads_first)  # [B, H, Lq, D]
    offset = (grads * outs).sum(-1) - (0 if grad_lse is None else grad_lse)
    offset = offset.unsqueeze(-1)  # [B, H, Lq, 1]
    lse = lse.masked_fill(lse == -torch.inf, torch.inf).unsqueeze(-1)  # no key: every share is 0
    uses = None
    if frame_table is not None:
        candidates = torch.arange(candidate_frames, device=query.device)
        uses = (frame_table.unsqueeze(-1) == candidates).sum(-2).to(wide)  # [B, H, (blocks,) candidate_frames]
        if query_block is None:
            uses = uses.unsqueeze(2)
        else:
            uses = uses.repeat_interleave(query_block, 2)[:, :, : query.shape[1]]  # [B, H, Lq, candidate_frames]

    grad_query = torch.zeros_like(queries)
    grad_key = torch.empty_like(key, memory_format=torch.contiguous_format)
    grad_value = torch.empty_like(value, memory_format=torch.contiguous_format)
    for frame in range(key.shape[1] // tokens_per_frame):
        tokens = slice(frame * tokens_per_frame, (frame + 1) * tokens_per_frame)
        keys, values = (states[:, tokens].transpose(1, 2).to(wide) for states in (key, value))  # [B, H, N, D]
        share = torch.exp(queries @ keys.mT * scale - lse)  # [B, H, Lq, N]
        if uses is not None and frame < candidate_frames:
            # a frame that was not chosen may have logits far above lse: drop it, do not multiply inf by 0
            use = uses[..., frame, None]  # [B, H, 1 or Lq, 1]
            share = torch.where(use > 0, share * use, 0.0)
        grad_value[:, tokens] = (share.mT @ grads).transpose(1, 2)
        grad_logits = share * (grads @ values.mT - offset) * scale
        grad_query += grad_logits @ keys
        grad_key[:, tokens] = (grad_logits.mT @ queries).transpose(1, 2)
    return grad_query.transpose(1, 2).to(query.dtype).contiguous(), grad_key, grad_value

"""Keys and values of the frames that each head chose, copied next to those that are always attended to."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .attention_tiles import chosen_tokens, load_rows
from .integers import cdiv, next_power_of_2


@triton.jit(do_not_specialize=["heads", "places", "tokens_per_frame", "candidate_frames", "tokens", "packed_tokens"])
def gather_kernel(
    key, value, frame_table, packed_key, packed_value,
    key_batch, key_token, key_head,
    value_batch, value_token, value_head,
    packed_key_batch, packed_key_token, packed_key_head,
    packed_value_batch, packed_value_token, packed_value_head,
    heads, places, tokens_per_frame, candidate_frames, tokens, packed_tokens,
    D: tl.constexpr, D_PAD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One tile of tokens of one head, of keys and values; grid (tiles, H, B). An empty place gives zeros."""
    tile, head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    chosen_tiles = places * tl.cdiv(tokens_per_frame, BN)
    candidates = candidate_frames.to(tl.int64) * tokens_per_frame
    token = candidates + (tile - chosen_tiles) * BN
    count = (tokens - token).to(tl.int32)
    room = count
    target = (packed_tokens - tokens + token).to(tl.int64)
    if tile < chosen_tiles:
        table_row = frame_table + (batch * heads + head) * places
        frame, start, count = chosen_tokens(tile, table_row, tokens_per_frame, candidate_frames, BN)
        room = tokens_per_frame - start
        token = frame.to(tl.int64) * tokens_per_frame + start
        target = tl.cast(tile // tl.cdiv(tokens_per_frame, BN), tl.int64) * tokens_per_frame + start
    keys = key + batch * key_batch + head * key_head + token * key_token
    values = value + batch * value_batch + head * value_head + token * value_token
    k = load_rows(keys, key_token, count, BN, D, D_PAD)
    v = load_rows(values, value_token, count, BN, D, D_PAD)
    row = tl.arange(0, BN)[:, None]
    channel = tl.arange(0, D_PAD)[None, :]
    inside = (row < room) & (channel < D)
    packed_keys = packed_key + batch * packed_key_batch + head * packed_key_head + target * packed_key_token
    packed_values = packed_value + batch * packed_value_batch + head * packed_value_head + target * packed_value_token
    tl.store(packed_keys + row * packed_key_token + channel, k, mask=inside)
    tl.store(packed_values + row * packed_value_token + channel, v, mask=inside)


def gather_into(
    key: Tensor,
    value: Tensor,
    frame_table: Tensor,
    tokens_per_frame: int,
    candidate_frames: int,
    packed_key: Tensor,
    packed_value: Tensor,
) -> None:
    """Write what every head chose to packed_key and packed_value, behind it the frames from candidate_frames on.

    key, value: [B, F*N, H, D], frame_table: [B, H, n]. packed_key, packed_value:
    [B, (n + F - candidate_frames)*N, H, D] in any memory that key and value do not share; an empty place is zeros.
    """
    batch, tokens, heads, head_dim = key.shape
    places = frame_table.shape[-1]
    config = configs.config("gather", key.device)
    rows = config.blocks["BN"]
    tiles = places * cdiv(tokens_per_frame, rows)
    tiles += cdiv(tokens - candidate_frames * tokens_per_frame, rows)
    gather_kernel[(tiles, heads, batch)](
        key, value, frame_table.contiguous(), packed_key, packed_value, *key.stride()[:3], *value.stride()[:3],
        *packed_key.stride()[:3], *packed_value.stride()[:3],
        heads, places, tokens_per_frame, candidate_frames, tokens, packed_key.shape[1],
        D=head_dim, D_PAD=next_power_of_2(head_dim), **config.options,
    )  # fmt: skip


def gather_frames(
    key: Tensor, value: Tensor, frame_table: Tensor, tokens_per_frame: int, candidate_frames: int
) -> tuple[Tensor, Tensor]:
    """key and value [B, F*N, H, D], frame_table [B, H, n] -> both as [B, n*N + (F - candidate_frames)*N, H, D].

    Every head has its own chosen frames in front of the frames from candidate_frames on; an empty place is zeros. The
    results are views of [B, H, tokens, D].
    """
    batch, tokens, heads, head_dim = key.shape
    packed_tokens = tokens + (frame_table.shape[-1] - candidate_frames) * tokens_per_frame
    packed = torch.empty((2, batch, heads, packed_tokens, head_dim), dtype=key.dtype, device=key.device).transpose(2, 3)
    gather_into(key, value, frame_table, tokens_per_frame, candidate_frames, packed[0], packed[1])
    return packed[0], packed[1]

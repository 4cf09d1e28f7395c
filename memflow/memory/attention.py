"""Attention to a memory, layer by layer, for engines that have queries, keys and values in hand and no module to patch.

What `flash_attn_with_kvcache` is for a KV cache: `attend_with_memory` writes the new keys and values where they belong
and attends to all that is visible, in place. The memory itself is driven around it:

    memory.switch_prompt(start, prompt)             # where a prompt begins, and a scene with it
    memory.update(start, prompt)                    # before a chunk: what is given up, what is shown
    step = memory.pass_over(start, frames, prompt)  # for every call of the model over these frames
    out = attend_with_memory(query, key, value, step, layer)
    memory.end_chunk(start)                         # after the call over the clean frames

examples/own_engine.py is such a loop.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from memflow.memory.places import Rotation, Unplaced, place_keys
from memflow_kernels import Pool, frame_means, memory_attention

if TYPE_CHECKING:
    from memflow.memory.views import Prompt


class Pass(NamedTuple):
    """One call of the transformer as the attention processors need it.

    pools: the layers' pools. prompt: what cross-attention attends to. grid: token rows and columns of a frame.
    start_frame: [1] int64 on the device, the place of its first frame (`memflow.memory.places`).
    slots: [n] int32, where the frames of the call are written (-1: nowhere).
    first_slot, end_slot: the slots attended to. candidates: how many of them compete.
    top_k: blocks of the candidates that a head attends to; None = all. block: tokens of a block, a frame's where None.
    unplaced: with relative positions, what a clean pass writes beside its keys, by layer.
    rotation: how keys turn with time.
    query_block: queries that choose together; None = all.
    block_means: mean keys of the blocks, where these are smaller than frames, by layer: [B, blocks, H, D].
    """

    pools: tuple[Pool, ...]
    prompt: Prompt | None
    grid: tuple[int, int]
    start_frame: Tensor
    slots: Tensor
    first_slot: int
    end_slot: int
    candidates: int
    top_k: int | None
    unplaced: tuple[Unplaced | None, ...] = ()
    rotation: Rotation | None = Rotation()
    block: int | None = None
    query_block: int | None = None
    block_means: tuple[Tensor, ...] = ()

    @property
    def blocks(self) -> int:
        """Blocks in a frame."""
        return 1 if self.block is None else self.grid[0] * self.grid[1] // self.block

    @property
    def chooses(self) -> bool:
        """Whether heads attend to a choice of the candidates in this call."""
        return self.top_k is not None and self.top_k < self.candidates * self.blocks


def attend_with_memory(
    query: Tensor, key: Tensor, value: Tensor, step: Pass, layer: int, *, rotated: bool = True
) -> Tensor:
    """Write a call's keys and values into the memory and attend to all frames that the call sees.

    Args:
        query: [B, F*N, H, D], normed, of the call's F frames of N tokens each.
        key: as query.
        value: as query.
        step: the call, from `FrameMemory.pass_over`.
        layer: number of the layer, from 0 on.
        rotated: True: query and key are turned by row, column and time already. False: by row and column only; they are
            turned by time here, to the place where attention sees the call's frames. Relative positions need False, and
            a model without rotation by time needs True.

    Returns:
        [B, F*N, H, D] in the dtype of query.

    Raises:
        ValueError: shapes that do not fit the memory, or rotated keys with relative positions.

    Example:
        >>> import torch
        >>> from memflow.memory import MemoryConfig, Prompt, make_memory
        >>> sizes = {"layers": 1, "batch": 1, "heads": 2, "head_dim": 24, "grid": (2, 3)}
        >>> memory = make_memory(MemoryConfig(), **sizes, dtype=torch.float32, device="cpu")
        >>> text = Prompt(torch.randn(1, 1, 4, 2, 24), torch.randn(1, 1, 4, 2, 24), torch.ones(1, 4, dtype=torch.bool))
        >>> query, key, value = torch.randn(3, 1, 18, 2, 24)  # a chunk of 3 frames of 6 tokens
        >>> memory.update(0, text)
        >>> attend_with_memory(query, key, value, memory.pass_over(0, 3, text), 0).shape
        torch.Size([1, 18, 2, 24])
    """
    pool = step.pools[layer]
    tokens = step.grid[0] * step.grid[1]
    count = len(step.slots)
    needed = (pool.key.shape[0], count * tokens, *pool.key.shape[2:])
    for name, x in (("query", query), ("key", key), ("value", value)):
        if tuple(x.shape) != needed:
            raise ValueError(f"{name} must be [B, F*N, H, D] = {list(needed)}, got {list(x.shape)}")
    unplaced = step.unplaced[layer] if step.unplaced else None
    if rotated and unplaced is not None:
        raise ValueError("rotated must be False with positions='relative': the memory turns keys by time itself")
    if not rotated and step.rotation is None:
        raise ValueError("rotated must be True for a memory whose keys do not turn with time (rotation=None)")
    if not rotated:
        frames = key.unflatten(1, (count, tokens))
        if unplaced is not None:
            unplaced.write(frames, step.slots)
        places = (step.start_frame + torch.arange(count, device=key.device)).unsqueeze(1)
        key = place_keys(frames, places, step.rotation).flatten(1, 2)
        query = place_keys(query.unflatten(1, (count, tokens)), places, step.rotation).flatten(1, 2)
    write_frames(key, value, pool, step.slots)
    return attend(query, None, pool, step, step.block_means[layer] if step.block_means else None)


def attend(
    query: Tensor, query_mean: Tensor | None, pool: Pool, step: Pass, block_mean: Tensor | None = None
) -> Tensor:
    """[B, L, H, D]: attention of queries [B, L, H, D] to the slots of `pool` that the call `step` sees.

    Args:
        query: normed and rotated.
        query_mean: [B, H, D], their mean where it is known and heads choose by it; else None.
        pool: that of the layer.
        step: the call.
        block_mean: [B, blocks, H, D], the layer's means of what heads choose among, where that is not whole frames.
    """
    tokens, blocks = step.grid[0] * step.grid[1], step.blocks
    count = step.end_slot - step.first_slot
    means = pool.frame_mean if block_mean is None else block_mean
    top_k = step.top_k if step.candidates else None
    return memory_attention(
        query,
        pool.key.narrow(1, step.first_slot * tokens, count * tokens),
        pool.value.narrow(1, step.first_slot * tokens, count * tokens),
        tokens_per_frame=tokens // blocks,  # to the op a block is a frame of its own
        candidate_frames=step.candidates * blocks,
        top_k=top_k,
        frame_mean=None if top_k is None else means.narrow(1, step.first_slot * blocks, step.candidates * blocks),
        query_mean=None if top_k is None else query_mean,
        query_block=step.query_block if step.chooses else None,
    )


def write_frames(key: Tensor, value: Tensor, pool: Pool, slots: Tensor) -> None:
    """Put keys and values [B, n*N, H, D] of n frames, and the keys' means, into `slots` [n] of `pool`; -1 = nowhere."""
    tokens = key.shape[1] // len(slots)
    means = frame_means(key, tokens)
    for index, slot in enumerate(slots.long().split(1)):  # one by one: a frame without a slot rewrites slot 0 as it is
        kept, slot = (slot < 0)[:, None, None], slot.clamp(min=0)
        mean = means[:, index : index + 1]
        pool.frame_mean[:, slot] = torch.where(kept, pool.frame_mean[:, slot], mean)
        for buffer, states in ((pool.key, key), (pool.value, value)):
            slots_of = buffer.unflatten(1, (-1, tokens))
            frame = states[:, index * tokens : (index + 1) * tokens].unsqueeze(1).to(buffer.dtype)
            slots_of[:, slot] = torch.where(kept[..., None], slots_of[:, slot], frame)

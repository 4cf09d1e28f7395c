"""What of a memory others see: a policy its frames, how relevant they are to a prompt and of which scene; people a
snapshot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from memflow.memory.places import place_keys
from memflow.memory.policies import Held
from memflow_kernels import prompt_relevance

if TYPE_CHECKING:
    from memflow.memory.frames import FrameMemory


class Prompt(NamedTuple):
    """A prompt as the transformer's layers see it.

    key, value: [layers, B, T, H, D], the cross-attention keys (normed, not rotated) and values.
    mask: [B, T] bool, True where a token counts (padding: False).
    """

    key: Tensor
    value: Tensor
    mask: Tensor


class MemorySnapshot(NamedTuple):
    """What the memory holds and shows, on the host.

    held: [layers, B, n] frame numbers, -1 = empty place. relevance: [layers, B, n], of each to the prompt in force, as
    the layers voted on it; NaN = empty. recalled: [layers, B, bank] numbers of the held frames that attention sees,
    -1 = empty place, a number may stand in several. sink, window: frame numbers.
    token_relevance: [layers, B, T, n], of each held frame to each token of the prompt in force, as the layers voted on
    it; NaN = empty.
    words: for each batch row the frames that attention sees in the bank, by number, and the words of the prompt that
    called for each, the strongest first; empty where nobody knows the text (`Stream.snapshot` does).
    """

    held: np.ndarray
    relevance: np.ndarray
    recalled: np.ndarray
    sink: list[int]
    window: list[int]
    token_relevance: np.ndarray
    words: Sequence[dict[int, list[str]]] = ()


def relevance_of(
    memory: FrameMemory, prompt: Prompt, means: Callable[[], Tensor], first_slot: int, count: int
) -> Tensor:
    """[layers, B, count] float32: relevance of the frames in the pool's slots from `first_slot` on, as the layers voted
    on it. means: call it for their mean keys, [layers, B, count, H, D]."""
    key, pool, aggregate = prompt.key, memory.pool, memory.config.aggregate
    mask = None if memory.padding_counts else prompt.mask.repeat(len(key), 1)
    if aggregate == "mean":
        scores = prompt_relevance(key.flatten(0, 1), frame_mean=means().flatten(0, 1), text_mask=mask)
    else:
        about = {"tokens_per_frame": pool.tokens_per_frame, "text_mask": mask, "aggregate": aggregate}
        mine = pool.ranks.mine(key).flatten(0, 1)
        scores = pool.ranks.mean(prompt_relevance(mine, pool.keys(first_slot, count), **about))
    return _vote(memory, scores.unflatten(0, key.shape[:2]))


def _token_relevance(memory: FrameMemory, prompt: Prompt) -> Tensor:
    """[layers, B, T, n] float32: relevance of what is held to each token, as the layers voted on it; 0 for padding."""
    key, mask, means = prompt.key, prompt.mask.repeat(len(prompt.key), 1), memory.held_means().flatten(0, 1)
    scores = prompt_relevance(key.flatten(0, 1), frame_mean=means, text_mask=mask, aggregate="token")
    return _vote(memory, scores.unflatten(0, key.shape[:2]))


def _vote(memory: FrameMemory, scores: Tensor) -> Tensor:
    """[layers, ...] as they are, or their mean over all layers but the first in every layer."""
    if memory.config.layers == "each" or len(scores) == 1:
        return scores
    return scores[1:].mean(0, keepdim=True).expand_as(scores)


def policy_view(
    memory: FrameMemory, frames: Tensor, means: Callable, relevance: Callable, prompt: Prompt | None = None
) -> Held:
    """Past frames of these numbers, mean keys and relevance, as a policy sees them. prompt: that they are chosen for,
    where they are held already."""
    # Absolute keys are turned by the number of their frame; memories are compared as they were before that.
    turned = memory.config.positions == "absolute" and memory.rotation is not None
    at_zero = (lambda: place_keys(means(), -frames, memory.rotation)) if turned else means
    scene = lambda: torch.bucketize(frames.contiguous(), memory.scene_starts, right=True)  # noqa: E731
    held = Held(frames, at_zero, relevance, partial(_vote, memory), memory.seeds, scene)
    if prompt is None:
        return held
    preferred, mask = memory.config.scene_frame, prompt.mask.float()
    return held._replace(
        token_relevance=lambda: _token_relevance(memory, prompt),
        token_weight=mask / mask.sum(1, keepdim=True).clamp(min=1),
        passed_over=None if preferred == "any" else lambda: passed_over(frames, scene(), preferred),
        all_seen=_all_seen(memory),
    )


def _all_seen(memory: FrameMemory) -> bool:
    """Whether a head attends to all of sink and bank in the coming chunk."""
    config, tokens = memory.config, memory.pool.tokens_per_frame
    candidates = config.sink_frames + memory.visible_bank()
    activated = config.activated_blocks(candidates, tokens)
    return activated is None or activated * (config.activation_block or tokens) >= candidates * tokens


def snapshot_of(memory: FrameMemory, stop: int, prompt: Prompt) -> MemorySnapshot:
    """What is held when the frames before `stop` have been made. Waits for the device: for reports."""
    held, tokens = memory.held.cpu(), prompt.mask.shape[1]
    here, relevance = held >= 0, torch.full(held.shape, torch.nan)
    by_token = torch.full((*held.shape, tokens), torch.nan)
    if here.any():
        relevance[here] = memory.relevance(prompt).float().cpu().flatten()
        by_token[here] = _token_relevance(memory, prompt).float().cpu().transpose(2, 3).reshape(-1, tokens)
    shown, spans = memory.shown.cpu().numpy().copy(), memory.pool.sink_and_window(stop)
    return MemorySnapshot(held.numpy().copy(), relevance.numpy(), shown, *spans, by_token.transpose(2, 3).numpy())


def passed_over(frames: Tensor, scene: Tensor, preferred: str) -> Tensor:
    """[layers, B, n] bool: True where another held frame of the same scene is preferred.

    Args:
        frames: [layers, B, n] int64, numbers of the held frames.
        scene: [layers, B, n] int64, numbers of their scenes, from 0 on.
        preferred: "first" or "latest".
    """
    reduce, worst = ("amin", torch.iinfo(torch.int64).max) if preferred == "first" else ("amax", -1)
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

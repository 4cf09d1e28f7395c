"""Attention for training: all chunks of a batch of stories at once, each seeing what a stream's memory would show it.

A row of the batch is a chunk. The first half of the rows holds the chunks clean, as the pass that fixes keys and values
sees them, the second half the same chunks noisy. Both attend to clean past frames and to themselves.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from examples.storybook.stories import CHUNK, Script
from memflow.memory.places import Places, place_keys
from memflow_kernels import qk_norm_rope

SINK, WINDOW = 3, 9
IN_VIEW = SINK + WINDOW - CHUNK  # of the frames that a chunk sees those of sink and window come first, so many at most
_BANKS = ((6, 0.6), (3, 0.3), (0, 0.1))  # places of the bank, and how often


class Visible(NamedTuple):
    """Past frames that each chunk attends to, besides itself.

    frames [chunks, n] int64: frame numbers, sink and window before the bank, which begins at IN_VIEW; -1 = nothing.
    places [chunks, n] int64: where they are seen.
    own [chunks, CHUNK] int64: places of the chunk's own frames.
    """

    frames: np.ndarray
    places: np.ndarray
    own: np.ndarray


def visible_frames(script: Script, random: np.random.Generator) -> Visible:
    """Sink, window and a bank of past prototypes, for every chunk of `script`.

    Most often the bank holds a frame of the chunk's character and one of its place, where there are any, in random
    slots among random others; else random frames, or none: what a policy might come up with.
    """
    bank = int(random.choice([size for size, _ in _BANKS], p=[share for _, share in _BANKS]))
    places = Places(sink=SINK, bank=bank, window=WINDOW)
    scenes = [script.scenes[i] for i in script.scene_of_chunks()]
    slots = SINK + max(size for size, _ in _BANKS) + WINDOW - CHUNK
    frames = np.full((len(scenes), slots), -1, dtype=np.int64)
    seen_at = np.zeros_like(frames)
    own = np.zeros((len(scenes), CHUNK), dtype=np.int64)
    for chunk in range(len(scenes)):
        start = chunk * CHUNK
        stop = start + CHUNK
        seen = [(f, places.of_sink(f, stop)) for f in range(min(SINK, start))]
        seen += [(f, places.of_window(f, stop)) for f in range(max(SINK, stop - WINDOW), start)]
        seen += [(-1, 0)] * (IN_VIEW - len(seen))
        recalled = _recall(chunk, scenes, bank, random)
        chosen = random.permutation(bank)[: len(recalled)]
        seen += [(c * CHUNK, places.of_bank(int(slot))) for c, slot in zip(recalled, chosen, strict=True)]
        frames[chunk, : len(seen)], seen_at[chunk, : len(seen)] = zip(*seen, strict=True)
        own[chunk] = [places.of_window(f, stop) for f in range(start, stop)]
    return Visible(frames, seen_at, own)


def _recall(chunk: int, scenes: list, bank: int, random: np.random.Generator) -> list[int]:
    """Up to `bank` earlier chunks whose first frames the bank holds while `chunk` is made."""
    past = [int(c) for c in random.permutation(np.arange(1, max(1, chunk - WINDOW // CHUNK + 1)))]
    mode = random.random()
    if not past or not bank or mode < 0.08:
        return []
    held: list[int] = []
    if mode < 0.8:
        for wanted in ("name", "place"):
            right = [c for c in past if getattr(scenes[c], wanted) == getattr(scenes[chunk], wanted)]
            held += [c for c in right[:1] if c not in held]
    count = max(len(held), int(random.integers(1, bank + 1)))
    return held + [c for c in past if c not in held][: count - len(held)]


@dataclass
class TrainingPass:
    """One call of the transformer over B stories of n chunks of F frames.

    frames: [B, n, V] int64, the past frames that a chunk sees, -1 = nothing. places: [B, n, V], where it sees them.
    own_places: [B, n, F]. grid: token rows and columns of a frame.
    text: [P, T, dim], projected embeddings of P prompts. text_mask: [P, T]. prompt_of: [B * n] int64, of each chunk.
    asking: [B, n, F N] float, tokens of the noisy chunks that show the character; wanted: [B, n, V N] float, tokens of
    the past frames that show the same one.
    The call adds one entry per layer to frame_means [B, n, F, H, D], mean clean keys at place 0; query_means
    [B * n, H, D], of the noisy rows; text_means [P, H, D], mean keys of a prompt's tokens; and, but for the first
    layer, attention, a scalar: how surprising it is, to the heads that look for characters, where the character was.
    """

    frames: Tensor
    places: Tensor
    own_places: Tensor
    grid: tuple[int, int]
    text: Tensor
    text_mask: Tensor
    prompt_of: Tensor
    asking: Tensor
    wanted: Tensor
    frame_means: list[Tensor] = field(default_factory=list)
    query_means: list[Tensor] = field(default_factory=list)
    text_means: list[Tensor] = field(default_factory=list)
    attention: list[Tensor] = field(default_factory=list)


class TrainingContext(nn.Module):
    """Takes the place of the transformer's `rope`; its processors read the pass in progress from it."""

    def __init__(self):
        super().__init__()
        self.step: TrainingPass | None = None

    def forward(self, hidden_states: Tensor) -> TrainingPass:
        return self.step


def set_training_attention(transformer: WanTransformer3DModel) -> TrainingContext:
    """Give the transformer the attention of this file, for good. Returns the context to put every `TrainingPass` in."""
    context = TrainingContext()
    for block in transformer.blocks:
        block.attn1.set_processor(TrainingSelfAttention(context))
        block.attn2.set_processor(TrainingCrossAttention(context))
    transformer.rope = context
    return context


class TrainingSelfAttention:
    """Self-attention to chosen past frames and to the chunk itself."""

    def __init__(self, context: TrainingContext):
        self.context = context

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        step = self.context.step
        tokens = step.grid[0] * step.grid[1]
        batch, chunks, _ = step.frames.shape
        projected = [project(hidden_states) for project in (attn.to_q, attn.to_k, attn.to_v)]
        # Every frame as a row of its own is a frame at place 0: turned by row and column only.
        query, key, value = (
            x.unflatten(2, (attn.heads, -1)).unflatten(1, (-1, tokens)).flatten(0, 1) for x in projected
        )
        query, key = qk_norm_rope(
            query,
            key,
            weight_q=attn.norm_q.weight,
            weight_k=attn.norm_k.weight,
            eps=attn.norm_q.eps,
            grid=step.grid,
            start_frame=0,
        )
        query, key, value = (x.unflatten(0, (2, batch, chunks, -1)) for x in (query, key, value))  # [2,B,n,F,N,H,D]
        step.frame_means.append(key[0].mean(3))
        step.query_means.append(query[1].mean((2, 3)).flatten(0, 1))

        story = torch.arange(batch, device=key.device)[:, None, None]
        index = step.frames.clamp(min=0)
        past_key = place_keys(key[0].flatten(1, 2)[story, index], step.places[..., None])  # [B, n, V, N, H, D]
        past_value = value[0].flatten(1, 2)[story, index]
        query, key = (place_keys(x, step.own_places[..., None]) for x in (query, key))
        nothing = torch.zeros(step.frames.shape, device=key.device).masked_fill(step.frames < 0, float("-inf"))
        nothing = nothing.repeat_interleave(tokens, -1)[:, :, None, None]
        out, past = _attend(*(_by_head(x) for x in (query, key, value, past_key, past_value)), nothing)
        if len(step.frame_means) > 1:
            step.attention.append(_surprise(past.split(past.shape[-2] // 2, dim=-2)[1], step.asking, step.wanted))
        out = out.transpose(-3, -2).flatten(-2).flatten(0, 2)
        return attn.to_out[1](attn.to_out[0](out))


class TrainingCrossAttention:
    """Cross-attention of every chunk, clean and noisy, to its own prompt; padding counts, as in a stream."""

    def __init__(self, context: TrainingContext):
        self.context = context

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        step = self.context.step
        key = attn.norm_k(attn.to_k(step.text)).unflatten(2, (attn.heads, -1))  # [P, T, H, D]
        value = attn.to_v(step.text).unflatten(2, (attn.heads, -1))
        mask = step.text_mask[..., None, None]
        step.text_means.append((key * mask).sum(1) / mask.sum(1))
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        query = torch.cat(query.chunk(2), dim=1).transpose(1, 2)  # [B n, H, 2 L, D]: clean and noisy side by side
        key, value = (x[step.prompt_of].transpose(1, 2) for x in (key, value))
        out = ((query @ key.transpose(-1, -2)) * query.shape[-1] ** -0.5).softmax(-1) @ value
        out = torch.cat(out.transpose(1, 2).flatten(2).chunk(2, dim=1))
        return attn.to_out[1](attn.to_out[0](out))


def _by_head(x: Tensor) -> Tensor:
    """[..., f, N, H, D] -> [..., H, f N, D]"""
    return x.flatten(-4, -3).transpose(-3, -2)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, past_key: Tensor, past_value: Tensor, nothing: Tensor
) -> tuple[Tensor, Tensor]:
    """Query, key, value [2, B, n, H, L, D]; past_key, past_value [B, n, H, M, D] -> [2, B, n, H, L, D], and the shares
    of attention that go to the past [B, n, H, 2 L, M].

    nothing: added to the scores of the past, -inf where there is nothing to see.

    Plain products and softmax, not memory_attention: the shares are wanted as well, half of which would have to be
    computed a second time, and at 48 queries and 16 tokens per frame that takes longer than it saves.
    """
    query = query * query.shape[-1] ** -0.5
    length, seen = query.shape[-2], past_key.shape[-2]
    past = torch.cat(query.unbind(), dim=-2) @ past_key.transpose(-1, -2)
    past += nothing
    own = torch.cat((query @ key.transpose(-1, -2)).unbind(), dim=-2)
    past, own = torch.cat([past, own], dim=-1).softmax(-1).split([seen, length], dim=-1)
    own = torch.stack(own.split(length, dim=-2)) @ value
    return torch.stack((past @ past_value).split(length, dim=-2)) + own, past


def _surprise(past: Tensor, asking: Tensor, wanted: Tensor) -> Tensor:
    """Mean -log of the share of all attention to the past that goes to wanted tokens, over the asking ones.

    past: [B, n, H, L, M]; the first half of the heads counts, the rest may look elsewhere.
    """
    past = past[:, :, : past.shape[2] // 2]
    right = torch.einsum("bnhlm,bnm->bnhl", past, wanted)
    surprise = (past.sum(-1) + 1e-6).log() - (right + 1e-6).log()
    counts = asking * (wanted.amax(-1, keepdim=True) > 0)
    return (surprise.mean(2) * counts).sum() / counts.sum().clamp(min=1)

"""Relative positions told a second time, slowly: every key is normed, turned by time, row and column from scratch for
every call, in float64, frame by frame, with lists in place of slots. Takes the memory's place in a stream."""

from __future__ import annotations

import functools
import math

import torch

from memflow.memory import MemoryConfig, Pass


@functools.cache
def cosines(place: int, grid: tuple[int, int], head_dim: int, rows_and_columns: bool):
    """cos and sin [N, 1, D/2] of the angles of one frame's tokens at (place, row, column), as Wan 2.1 turns them."""
    rows, cols = grid
    space = int(rows_and_columns)
    third = head_dim // 2 // 3
    angles = []
    for token in range(rows * cols):
        axes = ((head_dim // 2 - 2 * third, place), (third, space * (token // cols)), (third, space * (token % cols)))
        angles.append([position * 10000 ** (-i / size) for size, position in axes for i in range(size)])
    angles = torch.tensor(angles, dtype=torch.float64).unsqueeze(1)
    return angles.cos(), angles.sin()


def turned(x, place: int, grid: tuple[int, int], rows_and_columns: bool = True):
    """x [B, N, H, D] of one frame at a place: channel pairs (2i, 2i + 1) turned."""
    cos, sin = cosines(place, grid, x.shape[-1], rows_and_columns)
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def normed(x, norm):
    """RMS norm over all heads together; x [B, N, H, D]."""
    flat = x.double().flatten(2)
    return (flat / (flat.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight.double()).view(x.shape)


class SlowMemory:
    """In place of `FrameMemory` for a stream of one story, policy "prompt". Patch `SlowAttention` in with it."""

    def __init__(self, config: MemoryConfig, layers: int, grid: tuple[int, int], pool):
        self.config, self.layers, self.grid, self.pool = config, layers, grid, pool
        self.frames = [{} for _ in range(layers)]  # of sink and window: number -> normed key, value
        self.bank = [{} for _ in range(layers)]  # slot -> number, normed key, value

    def switch_prompt(self, start, prompt):
        pass

    def end_chunk(self, start):
        pass

    def recache_span(self, start):
        count = max(0, min(self.config.window_frames - self.config.frames_per_chunk, start - self.config.sink_frames))
        return start - count, count

    def update(self, start, prompt):
        leaving = [
            frame
            for frame in range(start - self.config.window_frames, start - self.config.window_frames + 3)
            if frame >= self.config.sink_frames and frame % self.config.frames_per_chunk == 0
        ]
        for frame in leaving:
            for layer in range(self.layers):
                slot = self.config.bank_frames - 1 - len(self.bank[layer])
                if slot < 0:
                    text = prompt.key[layer, 0, prompt.mask[0]].double().mean(0)  # [H, D]
                    scores = {
                        s: float((turned(key, 0, self.grid)[0].mean(0) * text).sum())
                        for s, (_, key, _) in self.bank[layer].items()
                    }
                    slot = min(scores, key=scores.get)
                self.bank[layer][slot] = (frame, *self.frames[layer][frame])

    def pass_over(self, start, frames, prompt):
        return Pass(
            pools=(None,) * self.layers,
            prompt=prompt,
            grid=self.grid,
            start_frame=None,
            slots=(start, start + frames),
            first_slot=0,
            end_slot=0,
            candidates=0,
            top_k=None,
            unplaced=(True,) * self.layers,
        )


class SlowAttention:
    """The methods of `MemorySelfAttention`; `memory` is set by the test."""

    memory: SlowMemory

    def __init__(self, layer: int):
        self.layer, self.called = layer, True

    def bind(self, step, clean):
        self.clean = bool(step.unplaced)

    def release(self):
        self.clean = False

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        query, own = self.write(attn, hidden_states, rotary_emb)
        out = self.attend(query, own, rotary_emb).to(hidden_states.dtype)
        return attn.to_out[1](attn.to_out[0](out.flatten(2)))

    def write(self, attn, hidden_states, step):
        memory, (start, stop) = self.memory, step.slots
        states = [
            layer(hidden_states).unflatten(2, (attn.heads, -1)).chunk(stop - start, 1)
            for layer in (attn.to_q, attn.to_k, attn.to_v)
        ]
        own = {}
        for frame, key, value in zip(range(start, stop), states[1], states[2], strict=True):
            own[frame] = (normed(key, attn.norm_k), value.double())
        if self.clean:
            memory.frames[self.layer] |= own
        return [normed(query, attn.norm_q) for query in states[0]], own

    def attend(self, query, own, step):
        memory, config, (start, stop) = self.memory, self.memory.config, step.slots
        total = config.sink_frames + config.bank_frames + config.window_frames
        known = memory.frames[self.layer] | own

        def at(frame, place):
            return turned(known[frame][0], place, memory.grid), known[frame][1]

        window = [at(f, total - stop + f) for f in range(max(config.sink_frames, stop - config.window_frames), stop)]
        candidates = [
            (turned(key, config.sink_frames + slot, memory.grid), value)
            for slot, (_, key, value) in sorted(memory.bank[self.layer].items())
        ]
        candidates += [at(f, max(total - stop + f, f)) for f in range(min(stop, config.sink_frames))]
        queries = torch.cat([turned(q, total - stop + start + i, memory.grid) for i, q in enumerate(query)], 1)
        heads = []
        for head in range(queries.shape[2]):
            seen = candidates
            if config.top_k and start >= config.sink_frames:
                mean = queries[0, :, head].mean(0)
                seen = sorted(candidates, key=lambda c: -float(c[0][0, :, head].mean(0) @ mean))[: config.top_k]
            keys, values = (torch.cat(x, 1)[0, :, head] for x in zip(*seen, *window, strict=True))
            logits = queries[0, :, head] @ keys.T / math.sqrt(keys.shape[1])
            heads.append(logits.softmax(-1) @ values)
        return torch.stack(heads, 1).unsqueeze(0)

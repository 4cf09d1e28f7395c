"""One call of a patched self-attention: norm, rotation and write into the caller's buffers, then attention in place."""

from __future__ import annotations

import math
import weakref
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from memflow.integrations.bank import FrameBank
from memflow.integrations.cache import FrameCache, Step
from memflow.integrations.caller import HALF
from memflow.integrations.checks import Call
from memflow_kernels import Pool, memory_attention, merge_attention, qk_norm_rope_write, select_frames
from memflow_kernels.choosing import best_of_few

if TYPE_CHECKING:
    from memflow.integrations.settings import Settings

JOIN_BELOW = 1 << 17  # numbers of the keys
WRITE = torch.ops.memflow.qk_norm_rope_write.default


class Planned(NamedTuple):
    """A call before anything of it has been written. keeps_sink: frames that are encoded again leave the sink alone.
    first: the first slot that attention sees. sink: slots that hold frames of the sink. seen: frames of the bank that
    attention sees. chooses: whether heads choose among sink and bank."""

    call: Call
    settings: Settings
    stored: bool
    keeps_sink: bool
    cache: FrameCache
    step: Step
    bank: FrameBank | None
    first: int
    sink: int
    seen: int
    chooses: bool


class CallerAttention:
    """Attends over what a caller keeps.

    module: the self-attention, for its weights. name: its name in the model, for errors.
    """

    def __init__(self, module, name: str):
        self.module, self.name = module, name
        self.weights: tuple[Tensor | None, Tensor | None] = None, None  # of the norms, in the call before

    def plan(self, call: Call, settings: Settings, stored: bool, keeps_sink: bool) -> Planned:
        """What a call does to the caller's buffers and what it sees. keeps_sink: as modules do that leave the update of
        the cache to the model; others write what they are given."""
        count, rows, columns = call.grid
        tokens = rows * columns
        sink = settings.sink or 0
        cache = FrameCache.of(call.kv_cache, tokens, sink, settings.rolls and call.has_indices, call.start)
        step = cache.step(call.start, count, keeps_sink and not call.over_sink, call.x.device)
        first = self._first_seen(cache, step, settings) if settings.seen_tokens is not None else 0
        sink = min(sink, len(step.frames))
        bank, seen = None, 0
        if call.kv_bank is not None:
            bank = FrameBank.of(call.kv_bank, tokens)
            if settings.sink:  # it is seen beside a sink only
                seen = bank.visible(call.kv_bank, call.start, call.start + count, settings, call.is_recache)
        chooses = settings.top_k is not None and settings.top_k < sink + seen
        return Planned(call, settings, stored, keeps_sink, cache, step, bank, first, sink, seen, chooses)

    def run(self, planned: Planned, scores: list[Tensor] | None = None) -> Tensor:
        """The output [B, L, C]; buffers and indices of the caller are what they are after the call. scores: takes what
        heads have chosen frames by, [B, H, candidates], for who wants to know."""
        call, cache, step = planned.call, planned.cache, planned.step
        if planned.settings.top_k is not None:
            cache.refresh_means(call.kv_cache)
        query, query_mean = self._write(planned)
        out = self._attend(planned, query, query_mean, scores)
        stop = call.start + call.grid[0]
        if planned.bank is not None and call.update_bank and planned.stored:
            self._record(planned, stop)
        cache.end_call(call.kv_cache, step, stop, planned.stored)
        return self.module.o(out.flatten(2))

    def _first_seen(self, cache: FrameCache, step: Step, settings: Settings) -> int:
        seen = settings.seen_tokens // cache.tokens
        if len(step.frames) <= seen:
            return 0
        if settings.sink or list(step.frames) != sorted(step.frames):
            raise ValueError(
                f"{self.name}.max_attention_size: {settings.seen_tokens} tokens are {seen} frames, and the cache holds "
                f"{len(step.frames)}; attention to a part of a cache with a sink, or of one that rolls, is not served"
            )
        return len(step.frames) - seen

    def _record(self, planned: Planned, stop: int) -> None:
        call, bank, tokens = planned.call, planned.bank, planned.cache.tokens
        place = planned.step.places[0]
        if place < 0 or call.is_recache:
            raise ValueError(
                f"{self.name}.forward: update_bank while frames are encoded again is not served: their first one is "
                "not written"
            )
        frame = slice(place * tokens, (place + 1) * tokens)
        ends = bank.ends(call.kv_bank, stop, planned.settings)
        bank.record(call.kv_bank, call.kv_cache["k"][:, frame], call.kv_cache["v"][:, frame])
        again = call.start > 0 and stop <= planned.cache.held.stop
        if not (again and planned.keeps_sink):  # modules that leave the update to the model count a chunk once
            bank.count(call.kv_bank, ends)

    def _write(self, planned: Planned) -> tuple[Tensor, Tensor | None]:
        """Queries [B, L, H, D] and, where heads choose frames, their mean [B, H, D]."""
        module, call, step = self.module, planned.call, planned.step
        x, norm_q, norm_k = call.x, module.norm_q, module.norm_k
        if vars(module).get("fused_projections", False):
            projected = module.to_qkv(x).chunk(3, dim=-1)
        else:
            projected = module.q(x), module.k(x), module.v(x)
        shape = (*x.shape[:2], module.num_heads, -1)
        query, key, value = (y.view(shape) for y in projected)
        if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
            raise ValueError(
                f"{self.name}.forward: gradients are asked for, and a patched model writes into its cache in place: "
                "call it under torch.no_grad() or torch.inference_mode(), and unpatch(model) to train it"
            )
        weights, pool = (norm_q.weight, norm_k.weight), planned.cache.pool(call.kv_cache)
        kind = *((y.shape, y.dtype, y.device) for y in (query, key, value)), call.grid
        if self._passed(planned.cache, kind, pool, weights) and not _recorded(query, key, value):
            first, start = (step.start, None) if isinstance(step.start, int) else (0, step.start)
            arguments = (query, key, value, *weights, norm_q.eps, *call.grid[1:], first, start)
            new_query, query_mean = WRITE(*arguments, *pool, step.slots, planned.chooses)
        else:
            try:
                written = qk_norm_rope_write(
                    query,
                    key,
                    value,
                    weight_q=weights[0],
                    weight_k=weights[1],
                    eps=norm_q.eps,
                    grid=call.grid[1:],
                    start_frame=step.start,
                    pool=pool,
                    slots=step.slots,
                    query_mean=planned.chooses,
                )
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"{self.name}: kv_cache['k'] is {pool.key.dtype} {list(pool.key.shape)}; q, k and v of this call "
                    f"give {query.dtype}, batch {query.shape[0]}, {query.shape[2]} heads x {query.shape[3]}: {error}"
                ) from error
            new_query, query_mean = written if planned.chooses else (written, None)
            self.weights, planned.cache.passed = weights, (kind, weakref.ref(pool.value))
        planned.cache.written(call.kv_cache)
        return new_query, query_mean

    def _passed(self, cache: FrameCache, kind: tuple, pool: Pool, weights: tuple[Tensor, Tensor]) -> bool:
        """Whether qk_norm_rope_write has found a call like this one to be in order, in these buffers: then its operator
        is called at once, as asking again takes a twentieth of a small model's time."""
        if cache.passed is None or cache.passed[0] != kind or cache.passed[1]() is not pool.value:
            return False
        return weights[0] is self.weights[0] and weights[1] is self.weights[1]

    def _attend(
        self, planned: Planned, query: Tensor, query_mean: Tensor | None, scores: list[Tensor] | None
    ) -> Tensor:
        """Attention over cache and bank, two buffers that are joined only where they are small."""
        tokens, sink, seen = planned.cache.tokens, planned.sink, planned.seen
        cache, bank, held = planned.call.kv_cache, planned.call.kv_bank, len(planned.step.frames)
        bank_part = [_frames(bank, 0, seen, tokens)] if seen else []
        if not planned.chooses:
            return _attention_over([*bank_part, _frames(cache, planned.first, held, tokens)], query, tokens)
        means, top_k = self._means(planned), planned.settings.top_k
        if scores is not None:
            scores.append(torch.einsum("bhd,bfhd->bhf", query_mean, means))
        states = _frames(cache, 0, held, tokens)
        if _small(states[0]):
            mask = _shown(query_mean, means, top_k, seen + held, tokens, query.dtype)
            out = _attention_over([*bank_part, states], query, tokens, mask)
            if not math.isnan(float(out.sum())):
                return out
            # It may be of values that no head chose: a mask does not keep NaN and infinity out, as what follows does.
        choice = select_frames(query_mean.unsqueeze(1), means, top_k)
        if query.device.type == "cpu":  # what was chosen is known here: nothing but that is attended to
            sources = [*bank_part, _frames(cache, 0, sink, tokens)]
            window = _frames(cache, sink, held, tokens) if held > sink else None
            if window is None or query.dtype in HALF:  # where a second call of torch's kernel costs more than the copy
                return _attention_over([_gather(choice, sources, tokens, window)], query, tokens)
            return _attention_over([_gather(choice, sources, tokens), window], query, tokens)
        parts = []
        for entries, first, frames, candidates in ((bank, 0, seen, seen), (cache, seen, held, sink)):
            if frames:
                inside = (choice >= first) & (choice < first + candidates)
                table = (choice - first).masked_fill(~inside, -1)
                states = _frames(entries, 0, frames, tokens)
                activation = {"candidate_frames": candidates, "frame_table": table}
                parts.append(memory_attention(query, *states, tokens_per_frame=tokens, return_lse=True, **activation))
        return parts[0][0] if len(parts) == 1 else merge_attention(*parts[0], *parts[1])[0]

    def _means(self, planned: Planned) -> Tensor:
        """[B, candidates, H, D]: mean keys of the frames that heads choose among, the bank's and then the sink's."""
        means = planned.cache.frame_mean.narrow(1, 0, planned.sink)
        if not planned.seen:
            return means
        return torch.cat([planned.bank.frame_means(planned.call.kv_bank, planned.seen), means], dim=1)


def _recorded(*states: Tensor) -> bool:
    """Whether autograd may have something to record of them, backwards or forwards."""
    if torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        return torch.is_grad_enabled()
    return any(unpack_dual(x).tangent is not None for x in states)


def _frames(entries: dict, first: int, stop: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Views of the keys and values of some frames."""
    if first == 0 and stop * tokens == entries["k"].shape[1]:
        return entries["k"], entries["v"]
    return tuple(entries[name].narrow(1, first * tokens, (stop - first) * tokens) for name in ("k", "v"))


def _small(key: Tensor) -> bool:
    """Whether joining frames costs less than attending to two parts and merging them, on the host alone."""
    return key.device.type == "cpu" and key.numel() < JOIN_BELOW


def _shown(query_mean: Tensor, means: Tensor, top_k: int, frames: int, tokens: int, dtype: torch.dtype) -> Tensor:
    """[B, H, 1, frames * N], to be added to the logits: every head sees the top_k best of the frames that `means`
    [B, F, H, D] belong to, as select_frames chooses them, and all behind them. Masking the others takes a small model's
    host less time than gathering these."""
    scores = (query_mean.unsqueeze(1) * means).sum(-1).tolist()  # [B][F][H]
    best = best_of_few([head for row in scores for head in zip(*row, strict=True)], top_k)
    if best is None:
        best = select_frames(query_mean.unsqueeze(1), means, top_k).flatten(0, 1).tolist()
    rest, candidates = [0.0] * (frames - means.shape[1]), range(means.shape[1])
    rows = [[0.0 if frame in chosen else -torch.inf for frame in candidates] + rest for chosen in best]
    mask = torch.tensor(rows, dtype=dtype, device=means.device).view(*query_mean.shape[:2], 1, frames, 1)
    return mask.expand(-1, -1, -1, -1, tokens).flatten(3)


def _attention_over(
    parts: list[tuple[Tensor, Tensor]], query: Tensor, tokens: int, mask: Tensor | None = None
) -> Tensor:
    """mask: of parts that are joined, on a CPU."""
    if len(parts) > 1 and _small(parts[-1][0]):
        parts = [tuple(torch.cat(states, dim=1) for states in zip(*parts, strict=True))]
    if len(parts) == 1 and query.device.type == "cpu":
        # What memory_attention comes to there, which on the way takes as long as a small model's attention: no table
        # is asked for, no log-sum-exp, no gradient.
        key, value = parts[0]
        states = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        return F.scaled_dot_product_attention(*states, attn_mask=mask).transpose(1, 2)
    if len(parts) == 1:
        return memory_attention(query, *parts[0], tokens_per_frame=tokens)
    outs = [memory_attention(query, *part, tokens_per_frame=tokens, return_lse=True) for part in parts]
    return merge_attention(*outs[0], *outs[1])[0]


def _gather(
    choice: Tensor, sources: list[tuple[Tensor, Tensor]], tokens: int, rest: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Keys and values [B, k * N (+ rest), H, D] of the frames in choice [B, H, k], which counts on through the sources,
    and of the rest behind them; each is copied once. A head's tokens follow one another."""
    table = choice.tolist()
    gathered = []
    for part in (0, 1):
        chosen = []
        for row, heads in enumerate(table):
            for head, numbers in enumerate(heads):
                frames = [frame for source in sources for frame in source[part][row, :, head].split(tokens)]
                chosen += [frames[number] for number in numbers]
                chosen += [] if rest is None else [rest[part][row, :, head]]
        shape = (len(table), len(table[0]), -1, chosen[0].shape[-1])
        gathered.append(torch.cat(chosen).view(shape).transpose(1, 2))
    return tuple(gathered)

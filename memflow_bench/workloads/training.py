"""Attention as training calls it: forward and backward, the backward alone, and under a block-causal mask."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import counts, oracle
from ..cases import Case
from ..states import AttentionState, Random, attention_state
from .base import Workload


class TrainingState(NamedTuple):
    """An attention call and the gradient of its result, upstream [B, Lq, H, D]."""

    call: AttentionState
    upstream: Tensor


class BlockCausalState(NamedTuple):
    """query, key, value and upstream [B, F*N, H, D] of a video whose blocks of case.chunk frames see each other and
    the blocks before."""

    case: Case
    query: Tensor
    key: Tensor
    value: Tensor
    upstream: Tensor


class Training(Workload):
    """Forward and backward of attention over memory and window. Runs return out and the gradients of query, key and
    value."""

    name = "training"
    warm_first = True
    passes = 3.5  # of the products of a forward: the backward has five where that has two

    def make_state(self, seed):
        call = attention_state(self.case, self.activated, self.dtype, self.device, seed)
        upstream = Random(self.dtype, self.device, seed + 1)(*call.query.shape)
        return TrainingState(call, upstream)

    def changing(self, state):
        call = state.call
        return [call.query, call.key, call.value, call.frame_mean, state.upstream]

    def expect(self):
        call, case = self.state.call, self.case
        wide = [x.double() for x in (call.query, call.key, call.value)]
        seen = oracle.choose(*wide[:2], case.tokens, case.candidates, call.top_k)
        visible = seen.repeat_interleave(case.tokens, -1).unsqueeze(2)
        return oracle.attention_and_gradients(*wide, self.state.upstream.double(), visible)

    def results(self, returned):
        return list(returned)

    def flops(self):
        return int(counts.attention_flops(self.case, self.activated) * self.passes)


class Backward(Training):
    """The backward alone: the forward is outside of what is timed."""

    name = "backward"
    passes = 2.5

    def changing(self, state):
        return [state.upstream]  # the rest belongs to the forward


class BlockCausalStep(Workload):
    """Forward and backward over a whole video under its block-causal mask, as the students of Self Forcing and
    CausVid are trained. Runs return out and the gradients of query, key and value."""

    name = "block_causal_step"
    warm_first = True
    takes_top_k = False
    passes = 3.5

    def make_state(self, seed):
        random = Random(self.dtype, self.device, seed)
        shape = (self.case.batch, self.case.window * self.case.tokens, self.case.heads, self.case.head_dim)
        return BlockCausalState(self.case, *(random(*shape) for _ in range(4)))

    def changing(self, state):
        return list(state[1:])

    def expect(self):
        visible = block_causal_mask(self.case, self.device)
        return oracle.attention_and_gradients(*(x.double() for x in self.state[1:]), visible)

    def results(self, returned):
        return list(returned)

    def flops(self):
        case = self.case
        seen = sum(min(start + case.chunk, case.window) * min(case.chunk, case.window - start)
                   for start in range(0, case.window, case.chunk))  # fmt: skip
        return int(4 * case.batch * case.heads * seen * case.tokens**2 * case.head_dim * self.passes)


class BlockCausal(BlockCausalStep):
    """The forward of the same. Runs return out."""

    name = "block_causal"
    passes = 1

    def expect(self):
        return super().expect()[:1]

    def results(self, returned):
        return [returned]


def block_causal_mask(case: Case, device: torch.device) -> Tensor:
    """[Lq, Lk] bool, one number per query and key: True where the query sees the key."""
    block = torch.arange(case.window * case.tokens, device=device) // (case.chunk * case.tokens)
    return block[:, None] >= block[None, :]

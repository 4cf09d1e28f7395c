"""The ops one by one: attention over memory, frame means, norm + rotation + write, update of the memory."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import counts, oracle
from ..states import attention_state, layer_state
from .base import Verdict, Workload, tensor


class Attention(Workload):
    """Choice of frames (activated) and attention of a chunk's queries over memory and window."""

    name = "attention"

    def make_state(self, seed):
        return attention_state(self.case, self.activated, self.dtype, self.device, seed)

    def changing(self, state):
        return [state.query, state.key, state.value, state.frame_mean]

    def expect(self):
        return [oracle.attention_rows(self.state)]

    def results(self, returned):
        return [sampled(returned, self.case.queries, self.dtype)]

    def flops(self):
        return counts.attention_flops(self.case, self.activated)

    def nbytes(self):
        return counts.attention_bytes(self.case, self.activated, self.size)


class Means(Workload):
    """Mean key of every candidate frame."""

    name = "means"
    takes_top_k = False

    def make_state(self, seed):
        return attention_state(self.case, False, self.dtype, self.device, seed)

    def changing(self, state):
        return [state.key]

    def expect(self):
        key = self.state.key[:, : self.case.candidates * self.case.tokens]
        return [key.double().unflatten(1, (-1, self.case.tokens)).mean(2)]

    def nbytes(self):
        return counts.means_bytes(self.case, self.size)


class Write(Workload):
    """Norm and rotation of a chunk's queries and keys, keys and values into the memory. Runs return query and new keys,
    both [B, Lq, H, D]."""

    name = "write"
    roundings = 4  # norm, weight, rotation, and the result
    takes_top_k = False

    def make_state(self, seed):
        return layer_state(self.case, False, self.dtype, self.device, seed)

    def changing(self, state):
        return [state.query, state.key, state.value]

    def expect(self):
        return list(oracle.normed_and_rotated(self.state))

    def results(self, returned):
        return list(returned)

    def nbytes(self):
        return counts.write_bytes(self.case, self.size)


class Update(Workload):
    """Relevance of the bank's frames to the prompt, choice, and replacement of one frame. Runs return the bank's keys
    [B, bank, N, H, D]; repeated, they move the same frame again. Of a GPU's model all layers are updated."""

    name = "update"
    takes_top_k = False

    @property
    def layers(self) -> int:
        return self.case.layers if self.device.type == "cuda" else 1

    def make_state(self, seed):
        if not self.case.bank:
            raise ValueError("the case has no bank")
        return layer_state(self.case, False, self.dtype, self.device, seed)

    def expect(self):
        return [oracle.by_content(oracle.updated_bank(self.state)[0])]

    def results(self, returned):
        return [oracle.by_content(tensor(returned))]

    def check(self, returned):
        return Verdict(super().check(returned).error, 0.0)  # frames are moved, not computed

    def nbytes(self):
        return counts.update_bytes(self.case, self.size, self.layers)


def sampled(x: Tensor, queries: int, dtype: torch.dtype) -> Tensor:
    """The rows of x [B, queries, ...] that are checked; an error where x has another length or dtype, or anything not
    finite: a sample of rows does not see what was never written."""
    if tensor(x).ndim < 2 or x.shape[1] != queries:
        raise ValueError(f"returned shape {list(x.shape)}, needed {queries} tokens")
    if x.dtype != dtype:
        raise ValueError(f"returned {x.dtype}, needed {dtype}")
    if not torch.isfinite(x).all():
        raise ValueError("the result holds NaN or infinity")
    return x[:, oracle.sample_rows(queries)]

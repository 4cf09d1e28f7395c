"""Who leaves a full bank.

A policy is a class with one method, `victim`; add it to POLICIES and it has a name everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from memflow_kernels import Pool


class BankView(NamedTuple):
    """What a policy may look at.

    held: [layers, B, bank] int64, the latent-frame number in each slot of the full bank.
    pool: its slots, layers and batch rows together: key, value [layers * B, bank * N, H, D] and frame_mean.
    relevance: call it for [layers, B, bank] float32, the relevance of each frame to the coming prompt.
    """

    held: Tensor
    pool: Pool
    relevance: Callable[[], Tensor]


class PromptPolicy:
    """The frame that the coming prompt calls for least gives its place."""

    def victim(self, bank: BankView) -> Tensor:
        """[layers, B] slots to give up."""
        return bank.relevance().argmin(-1)


class FifoPolicy:
    """The oldest frame gives its place."""

    def victim(self, bank: BankView) -> Tensor:
        """[layers, B] slots to give up."""
        return bank.held.argmin(-1)


class NoPolicy:
    """No bank: sink and window alone. A memory with this policy has no bank slots, so that it is never asked."""

    def victim(self, bank: BankView) -> Tensor:
        raise RuntimeError("policy 'none' keeps no bank, so that no frame can leave it")


POLICIES: dict[str, type] = {"prompt": PromptPolicy, "fifo": FifoPolicy, "none": NoPolicy}

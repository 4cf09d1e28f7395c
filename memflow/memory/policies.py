"""What is forgotten and what is recalled.

A policy is a class with one method of its own: `victim` (who leaves), `worth` (who is shown, frame by frame) or
`choose` (who is shown, as a set); add it to POLICIES and `MemoryConfig(policy=...)` has it, saving and tests included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # imported where it computes: the command line lists POLICIES in its help
    from torch import Tensor


PASSED_OVER = 1000.0  # more than any relevance differs by: frames of a scene that are not preferred come last


class Held(NamedTuple):
    """Past frames, n of them in every layer and batch row, as a policy sees them.

    frames: [layers, B, n] int64, their numbers.
    frame_mean: call it for [layers, B, n, H, D], their mean keys, turned back in time to place 0.
    relevance: call it for [layers, B, n] float32, how much the coming prompt calls for each.
    vote: turns any [layers, ...] of scores into what `MemoryConfig.layers` asks for; relevance() has been voted on.
    seeds: [B] int64, those of the stories.
    scene: call it for [layers, B, n] int64, the number of the scene that each frame is of: a prompt begins one.
    token_relevance: call it for [layers, B, T, n] float32, how much each token of the prompt calls for each frame.
    token_weight: [B, T] float32, how much each token counts: the same for all, 0 for padding, 1 in all.
    passed_over: call it for [layers, B, n] bool, True where another held frame of the same scene is preferred; None:
        none is (`MemoryConfig.scene_frame`).
    all_seen: every head attends to all that is shown; False: to some of it (`MemoryConfig.top_k`, `activated`).
    """

    frames: Tensor
    frame_mean: Callable[[], Tensor]
    relevance: Callable[[], Tensor]
    vote: Callable[[Tensor], Tensor]
    seeds: Tensor
    scene: Callable[[], Tensor] | None = None
    token_relevance: Callable[[], Tensor] | None = None
    token_weight: Tensor | None = None
    passed_over: Callable[[], Tensor] | None = None
    all_seen: bool = True


class PromptPolicy:
    """The frame that the coming prompt calls for least is given up, those that it calls for most are shown.

    keeps_all: every past frame is held, in host memory, and `victim` is never asked. by_hand: the caller says what is
    shown, so that the command line does not offer it.
    """

    keeps_all = by_hand = False

    @classmethod
    def by_relevance(cls) -> bool:
        """Whether the prompt decides what is shown, so that `MemoryConfig` may say how."""
        return cls.worth is PromptPolicy.worth and cls.choose is PromptPolicy.choose

    def victim(self, held: Held, newcomer: Held) -> Tensor:
        """[layers, B] index of the frame that gives its place to the newcomer (n = 1); -1: the newcomer is not held."""
        return self.worth(held).argmin(-1)

    def worth(self, held: Held) -> Tensor:
        """[layers, B, n]: the bank shows the frames with the highest."""
        return held.relevance()

    def choose(self, held: Held, k: int) -> Tensor:
        """[layers, B, k] indices of the frames that the bank shows."""
        worth = self.worth(held)
        if held.passed_over is not None:
            worth = worth - PASSED_OVER * held.passed_over()
        return worth.topk(k).indices


class FifoPolicy(PromptPolicy):
    """The oldest frame is given up."""

    def victim(self, held: Held, newcomer: Held) -> Tensor:
        return held.frames.argmin(-1)


class DiversePolicy(PromptPolicy):
    """Of the two frames that are most alike the older is given up, so that what is held depends on no prompt.

    Alike: least Euclidean distance of the mean keys, all heads together. It bounds by how much any query can prefer
    one frame to the other, and what all frames have in common drops out.
    """

    def victim(self, held: Held, newcomer: Held) -> Tensor:
        import torch

        frames = torch.cat([held.frames, newcomer.frames], 2)
        means = torch.cat([held.frame_mean(), newcomer.frame_mean()], 2).flatten(3)  # [layers, B, n + 1, H*D]
        distance = torch.cdist(means, means, compute_mode="donot_use_mm_for_euclid_dist")
        count = frames.shape[2]
        itself = torch.eye(count, dtype=torch.bool, device=means.device)
        nearest = held.vote(distance).masked_fill(itself, torch.inf).flatten(2).argmin(-1)
        pair = torch.stack([nearest // count, nearest % count], -1)  # [layers, B, 2]
        leaving = pair.gather(-1, self.leaving(frames.gather(-1, pair))).squeeze(-1)
        return torch.where(leaving == count - 1, -1, leaving)

    def leaving(self, frames: Tensor) -> Tensor:
        """[layers, B, 1]: which of two frames, given by their numbers [layers, B, 2], is given up."""
        return frames.argmin(-1, keepdim=True)


class OriginalPolicy(DiversePolicy):
    """Of the two frames that are most alike the newer is given up, so that what is held is how all looked at first.

    A frame that is made repeats what is recalled, never quite: where the newer is held the next one repeats the
    repetition, and what nobody says again drifts away. Where looks are meant to change, `DiversePolicy` holds the last.
    """

    def leaving(self, frames: Tensor) -> Tensor:
        return frames.argmax(-1, keepdim=True)


class RandomPolicy(PromptPolicy):
    """Every past frame is held, and shown, with the same probability. The same in all layers; a story's seed decides.

    A frame's worth is a random number that its own number and the seed fix, and the highest are kept.
    """

    def victim(self, held: Held, newcomer: Held) -> Tensor:
        import torch

        lowest, index = self.worth(held).min(-1)
        return torch.where(self.worth(newcomer).squeeze(-1) < lowest, -1, index)

    def worth(self, held: Held) -> Tensor:
        return _draw(held.frames, held.seeds)


class ArchivePolicy(PromptPolicy):
    """Nothing is forgotten: the frames that the coming prompt calls for are brought back from host memory."""

    keeps_all = True


class OraclePolicy(PromptPolicy):
    """Nothing is forgotten, and the caller says what is shown: for experiments that know what should be remembered.

    Before a chunk is made set `stream.memory.policy.wanted`: for each batch row the numbers of past frames, prototypes
    that have left the window. Places that are left over show the newest of the others. `Stream.save` does not keep it.
    """

    keeps_all = by_hand = True

    def __init__(self):
        self.wanted: Sequence[Sequence[int]] = ()

    def worth(self, held: Held) -> Tensor:
        import torch

        worth = held.frames.double()
        if not self.wanted:
            return worth
        if len(self.wanted) != worth.shape[1]:
            raise ValueError(f"wanted must have one list of frames per batch row ({worth.shape[1]}), got {self.wanted}")
        for row, frames in enumerate(self.wanted):
            numbers = torch.tensor(list(frames), dtype=torch.int64, device=worth.device)
            worth[:, row] += torch.isin(held.frames[:, row], numbers) * 2.0**40  # above all frame numbers
        return worth


class NoPolicy(PromptPolicy):
    """No bank: sink and window alone. A memory with this policy has no bank slots, so that it is never asked."""


POLICIES: dict[str, type[PromptPolicy]] = {
    "prompt": PromptPolicy,
    "fifo": FifoPolicy,
    "diverse": DiversePolicy,
    "original": OriginalPolicy,
    "archive": ArchivePolicy,
    "random": RandomPolicy,
    "oracle": OraclePolicy,
    "none": NoPolicy,
}
# By name what each does, in a sentence, without those that a program asks for by hand.
OFFERED = {name: " ".join(kind.__doc__.split(".")[0].split()) for name, kind in POLICIES.items() if not kind.by_hand}


def _draw(frames: Tensor, seeds: Tensor) -> Tensor:
    """A random number in [0, 1), float64, for each of `frames` [layers, B, n] and the seed of its row.

    The finaliser of SplitMix64 (Steele, Lea, Flood 2014) over both, in wrapping 64-bit arithmetic.
    """
    x = frames + _mix(seeds)[:, None]
    return _shift(_mix(x), 11).double() / 2.0**53


def _mix(x: Tensor) -> Tensor:
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(constant: int) -> int:
    return constant - 2**64 if constant >= 2**63 else constant

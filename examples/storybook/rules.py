"""Rules for what the bank shows of all that is held: those of `MemoryConfig`, and others to compare them with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from memflow.memory import MemoryConfig
from memflow.memory.policies import Held
from memflow.memory.recall import originals

ONCE_EACH = 1000.0  # more than any relevance differs by
LIKENESS = 1.5  # what likeness counts beside relevance in `marginal_relevance`, the best of those that were tried


class Rule(NamedTuple):
    """recall, scene_frame: as in `MemoryConfig`. choose: takes the place of the policy's own, if any."""

    recall: str = "relevance"
    scene_frame: str = "any"
    choose: Callable[[Held, int], Tensor] | None = None

    def config(self, trained: MemoryConfig, **changes) -> MemoryConfig:
        """`trained`, with this rule and other changes."""
        return replace(trained, recall=self.recall, scene_frame=self.scene_frame, **changes)

    def apply(self, memory) -> None:
        """Let a `FrameMemory` that was made with `config` choose by this rule."""
        if self.choose is not None:
            memory.policy.choose = self.choose


def one_per_scene(held: Held, k: int) -> Tensor:
    """The most relevant frame of each scene, by relevance; then the others."""
    relevance, scene = held.relevance(), held.scene()
    order = relevance.argsort(dim=-1, descending=True, stable=True)
    scene = scene.gather(-1, order)
    same = (scene.unsqueeze(-1) == scene.unsqueeze(-2)).tril(-1)  # a better one of the same scene
    worth = relevance.gather(-1, order) - ONCE_EACH * same.any(-1)
    return order.gather(-1, worth.topk(k).indices)


def marginal_relevance(held: Held, k: int) -> Tensor:
    """Relevance less likeness to what is shown already (maximal marginal relevance: Carbonell, Goldstein 1998)."""
    relevance = held.relevance()
    relevance = (relevance - relevance.mean(-1, keepdim=True)) / (relevance.std(-1, keepdim=True) + 1e-6)
    means = held.frame_mean().flatten(3)
    means = torch.nn.functional.normalize(means - means.mean(2, keepdim=True), dim=-1)
    likeness = held.vote(means @ means.mT)  # [layers, B, n, n]
    taken, shown, chosen = torch.zeros_like(relevance, dtype=torch.bool), None, []
    for _ in range(k):
        worth = relevance if shown is None else relevance - LIKENESS * shown
        index = worth.masked_fill(taken, -torch.inf).argmax(-1, keepdim=True)
        chosen.append(index)
        taken = taken.scatter(-1, index, True)
        like = likeness.gather(-1, index.unsqueeze(-2).expand(*likeness.shape[:3], 1)).squeeze(-1)
        shown = like if shown is None else torch.maximum(shown, like)
    return torch.cat(chosen, -1)


def each_once(held: Held, k: int) -> Tensor:
    """The originals; places that are left over show what the prompt calls for least, not the originals again."""
    return originals(held._replace(all_seen=False), k)


RULES = {
    "top": Rule(),
    "marginal relevance": Rule(choose=marginal_relevance),
    "one per scene, then top": Rule(choose=one_per_scene),
    "coverage": Rule("coverage"),
    "first of scene, then top": Rule(scene_frame="first"),
    "first of scene, then coverage": Rule("coverage", "first"),
    "latest of scene, then coverage": Rule("coverage", "latest"),
    "originals, each once": Rule(choose=each_once),
    "originals": Rule("originals"),
}
TODAY, COVERED, ONCE, BETTER = "top", "first of scene, then coverage", "originals, each once", "originals"

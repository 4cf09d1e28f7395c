"""A memory that holds more past frames than attention sees, and shows those that the coming prompt calls for."""

from __future__ import annotations

import torch
from torch import Tensor

from memflow.memory.config import MemoryConfig
from memflow.memory.frames import FrameMemory, MemorySnapshot, Prompt
from memflow.memory.policies import Held
from memflow.memory.store import Archive, Reserve
from memflow_kernels import prompt_relevance


class RecallMemory(FrameMemory):
    """`FrameMemory` with a store behind the bank: prototypes enter the store, copies of the chosen ones the bank.

    Before each chunk the policy says what every held frame is worth, and the bank shows those worth most. A frame that
    is shown already stays in its slot: a chunk copies only what it recalls anew.

    held: [layers, B, n] numbers of the frames in the store, -1 = empty. shown: [layers, B, bank] numbers in the bank
    slots, -1 = empty.
    """

    def __init__(self, config: MemoryConfig, **shape):
        self.extra_slots = config.held_frames or 0
        super().__init__(config, **shape)
        self.shown = self.held
        self.held = self.shown.new_full((*self.shown.shape[:2], self.extra_slots), -1)
        self.store = Archive(self.pool) if config.keeps_all else Reserve(self.pool)

    def admit(self, prototype: int, prompt: Prompt) -> None:
        source, used = self.pool.slot_of(prototype), self.store.used
        if self.config.keeps_all:
            self.store.add(source)
            self.held = torch.cat([self.held, self.held.new_full((*self.held.shape[:2], 1), prototype)], -1)
        elif used < self.extra_slots:
            self.store.add(source)
            self.held[..., used] = prototype
        else:
            index = self.policy.victim(self._held(prompt), self._newcomer(prototype, prompt))
            self.store.replace(index, source)
            self._note(index, prototype)

    def recall(self, prompt: Prompt) -> None:
        """Bring the frames worth most into the bank."""
        self.bank_used = min(self.store.used, self.config.bank_frames)
        if not self.bank_used:
            return
        held, first = self._held(prompt), self.config.bank_frames - self.bank_used
        chosen = self.policy.worth(held).topk(self.bank_used).indices
        shown = self.shown[..., first:]
        source = _sources(chosen, held.frames.gather(2, chosen), shown)
        self.store.bring(source, first)
        shown.copy_(torch.where(source < 0, shown, held.frames.gather(2, source.clamp(min=0))))

    def relevance(self, prompt: Prompt) -> Tensor:
        """[layers, B, n] float32: relevance of all that is held to the prompt, as the layers voted on it."""
        if not self.config.keeps_all:
            return super().relevance(prompt)
        mask = prompt.mask.repeat(prompt.key.shape[0], 1)
        means = self.store.means().flatten(0, 1)
        scores = prompt_relevance(prompt.key.flatten(0, 1), frame_mean=means, text_mask=mask)
        return self._vote(scores.unflatten(0, prompt.key.shape[:2]))

    def snapshot(self, stop: int, prompt: Prompt) -> MemorySnapshot:
        """What is held and shown when the frames before `stop` have been made. Waits for the device: for reports."""
        held = self.held.cpu()
        relevance = torch.full(held.shape, float("nan"))
        if self.store.used:
            relevance[..., : self.store.used] = self.relevance(prompt).float().cpu()
        return MemorySnapshot(held.numpy(), relevance.numpy(), self.shown.cpu().numpy(), *self._spans(stop))

    def state_dict(self):
        tensors, counters = super().state_dict()
        return {**tensors, **self.store.state_dict(), "shown": self.shown}, {**counters, "used": self.store.used}

    def load_state_dict(self, tensors, counters) -> None:
        self.held = torch.empty_like(tensors["held"], device=self.held.device)
        super().load_state_dict(tensors, counters)
        self.shown.copy_(tensors["shown"])
        self.store.load_state_dict(tensors, counters["used"])

    def _used_slots(self) -> tuple[int, int]:
        return self.pool.first_extra_slot, self.store.used

    def _held(self, prompt: Prompt) -> Held:
        frames = self.held[..., : self.store.used]
        return self._view(frames, self.store.means, lambda: self.relevance(prompt))


def _sources(chosen: Tensor, frames: Tensor, shown: Tensor) -> Tensor:
    """Which of the held frames each bank slot takes, [layers, B, k]; -1 = it keeps the one that it shows.

    chosen, frames: [layers, B, k] indices and numbers of the frames to show. shown: [layers, B, k] numbers shown now.
    A chosen frame that is shown already stays where it is; the others take the slots that become free, in order.
    """
    same = shown.unsqueeze(-1) == frames.unsqueeze(-2)  # [layers, B, slot, chosen]
    stays, known = same.any(-1), same.any(-2)
    free = stays.int().argsort(dim=-1, stable=True)  # slots, those to be filled first
    new = known.int().argsort(dim=-1, stable=True)  # as many of the chosen first that are not shown yet
    taken = torch.where(known, -1, chosen).gather(-1, new)
    return torch.full_like(chosen, -1).scatter(-1, free, taken)

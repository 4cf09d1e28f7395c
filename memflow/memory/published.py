"""The memory exactly as the published code computes it, for its checkpoints and for the recorded numbers.

What it does otherwise than `FrameMemory`, all of it listed in docs/memory.md: a pending prototype is inserted again
before every chunk until another is recorded, so that copies can fill the bank; a switched prompt scores with zeros
until its first chunk is made; a switch early in the stream re-encodes the sink too; padding tokens count.
"""

from __future__ import annotations

import torch

from memflow.memory.config import MemoryConfig
from memflow.memory.frames import FrameMemory
from memflow.memory.slots import copy_exactly
from memflow.memory.views import Prompt


class PublishedMemory(FrameMemory):
    """`FrameMemory` with the published update. One more slot, the last, holds the pending prototype."""

    extra_slots = 1
    padding_counts = True
    counters = ("bank_used", "pending_frame", "pending_is_new", "recorded", "text_known")

    def __init__(self, config: MemoryConfig, **shape):
        super().__init__(config, **shape)
        bank = config.bank_frames
        self.pending_slot = self.pool.first_extra_slot
        self.pending_frame = -1
        self.pending_is_new = False
        self.recorded = 0
        self.text_known = False
        # The published bank is an ordered list; this names the slot of each of its places.
        self.order = torch.arange(bank - 1, -1, -1, device=self.shown.device).expand(self.shown.shape).clone()

    def switch_prompt(self, start: int, prompt: Prompt) -> None:
        self.text_known = False
        if not self.config.global_sink:
            self.pool.clear_sink_and_window()
        if start > 0:
            self.update(start, prompt)

    def update(self, start: int, prompt: Prompt | None) -> None:
        """Insert the pending prototype; a full bank keeps the best others, best first."""
        places = self.config.bank_frames
        if self.recorded > places:
            scores = (
                self.relevance(prompt) if self.text_known else torch.zeros(self.shown.shape, device=self.shown.device)
            )
            self.insert_pending(scores)
        elif self.pending_is_new:
            self.bank_used = self.recorded
            slot = places - self.recorded
            self.pool.replace(slot, self.pending_slot)
            self.shown[..., slot] = self.pending_frame
        self.pending_is_new = False

    def insert_pending(self, scores: torch.Tensor) -> None:
        """Replace the frame with the lowest of `scores` [layers, B, bank] (per slot); ties keep the earlier places."""
        ranking = scores.gather(2, self.order).sort(dim=2, descending=True, stable=True).indices
        self.order = self.order.gather(2, ranking)
        victim = self.order[..., -1]
        self.pool.replace(victim, self.pending_slot)
        self.shown.scatter_(2, victim.unsqueeze(-1), self.pending_frame)

    def end_chunk(self, start: int) -> None:
        chunk = start // self.config.frames_per_chunk
        if self.config.published_mode == "single" or chunk % self.config.record_interval == 0:
            self.pool.replace(self.pending_slot, self.pool.slot_of(start))
            self.pending_frame = start
            self.pending_is_new = True
            self.recorded = chunk // self.config.record_interval + 1
        self.text_known = True

    def recache_span(self, start: int) -> tuple[int, int]:
        frames = min(self.config.sink_frames + self.config.window_frames, start)
        return start - frames, frames

    def visible_bank(self) -> int:
        # Without a sink the published attention never looks at the bank.
        return min(self.recorded, self.config.bank_frames) if self.config.sink_frames else 0

    def state_dict(self):
        tensors, counters = super().state_dict()
        return {**tensors, "order": self.order}, counters

    def load_state_dict(self, tensors, counters) -> None:
        super().load_state_dict(tensors, counters)
        copy_exactly(self.order, tensors, "order")

    def _candidates(self, start: int, stop: int, bank: int) -> int:
        return bank + min(self.config.sink_frames, stop)

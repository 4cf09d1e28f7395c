"""A memory that holds more past frames than attention sees, and shows those that the coming prompt calls for.

What is held and not shown lies in slots of the pool behind the window (`Reserve`) or in host memory (`Archive`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from memflow.memory.config import MemoryConfig
from memflow.memory.frames import FrameMemory
from memflow.memory.policies import Held
from memflow.memory.recall import CHOICES
from memflow.memory.slots import FramePool, copy_exactly, note_frame
from memflow.memory.views import Prompt, policy_view


class HeldMemory(FrameMemory):
    """`FrameMemory` with a store behind the bank: prototypes enter the store, copies of the chosen ones the bank.

    Before each chunk the bank shows the held frames that the policy or `MemoryConfig.recall` chooses. A frame that is
    shown already stays in its slot: a chunk copies only what it recalls anew.

    stored: [layers, B, n] numbers of the frames in the store, -1 = empty: all that is held.
    shown: [layers, B, bank] numbers in the bank slots, -1 = empty; a number may stand in several.
    """

    def __init__(self, config: MemoryConfig, **shape):
        self.extra_slots = config.held_frames or 0
        super().__init__(config, **shape)
        self.stored = self.shown.new_full((*self.shown.shape[:2], self.extra_slots), -1)
        self.store = Archive(self.pool) if config.keeps_all else Reserve(self.pool)

    @property
    def held(self) -> Tensor:
        return self.stored

    def admit(self, prototype: int, prompt: Prompt) -> None:
        source, used = self.pool.slot_of(prototype), self.store.used
        if self.config.keeps_all:
            self.store.add(source)
            self.stored = torch.cat([self.stored, torch.full_like(self.shown[..., :1], prototype)], -1)
        elif used < self.extra_slots:
            self.store.add(source)
            self.stored[..., used] = prototype
        else:
            index = self.policy.victim(self._held(prompt), self._newcomer(prototype, prompt))
            self.store.replace(index, source)
            note_frame(self.stored, index, prototype)

    def recall(self, prompt: Prompt) -> None:
        """Bring the frames that the prompt calls for into the bank."""
        self.bank_used = min(self.store.used, self.config.bank_frames)
        if not self.bank_used:
            return
        held, first = self._held(prompt), self.config.bank_frames - self.bank_used
        choose = CHOICES.get(self.config.recall, self.policy.choose)
        chosen = choose(held, self.bank_used)
        shown = self.shown[..., first:]
        source = _sources(chosen, held.frames.gather(2, chosen), shown)
        self.store.bring(source, first)
        shown.copy_(torch.where(source < 0, shown, held.frames.gather(2, source.clamp(min=0))))

    def state_dict(self):
        tensors, counters = super().state_dict()
        return {**tensors, **self.store.state_dict(), "stored": self.stored}, {**counters, "used": self.store.used}

    def load_state_dict(self, tensors, counters) -> None:
        super().load_state_dict(tensors, counters)
        used, stored = counters.get("used"), tensors.get("stored")
        if stored is None or not stored.ndim:
            raise ValueError(f"stored must be [layers, B, n], got {'nothing' if stored is None else 'one number'}")
        n = stored.shape[-1]
        if (
            not isinstance(used, int)
            or not 0 <= used <= n
            or (used < n if self.config.keeps_all else n != self.extra_slots)
        ):
            raise ValueError(f"used must be how many of the {n} stored frames there are, got {used!r}")
        self.stored = torch.empty_like(self.shown[..., :1]).repeat(1, 1, n)
        copy_exactly(self.stored, tensors, "stored")
        self.store.load_state_dict(tensors, used)

    def _used_slots(self) -> tuple[int, int]:
        return self.pool.first_extra_slot, self.store.used

    def _held(self, prompt: Prompt) -> Held:
        frames = self.stored[..., : self.store.used]
        return policy_view(self, frames, self.held_means, lambda: self.relevance(prompt), prompt)

    def held_means(self) -> Tensor:
        return self.store.means()


class Reserve:
    """Frames in the pool's extra slots, each layer and batch row with frames of its own. used: how many are held."""

    def __init__(self, pool: FramePool):
        self.pool, self.first = pool, pool.first_extra_slot
        self.used = 0

    def add(self, source_slot: int) -> None:
        """Hold a copy of the frame in a slot of the pool, after all others."""
        self.pool.replace(self.first + self.used, source_slot)
        self.used += 1

    def replace(self, index: Tensor, source_slot: int) -> None:
        """The same in place of frame `index` [layers, B]; nothing where that is -1."""
        self.pool.replace(torch.where(index < 0, -1, self.first + index), source_slot)

    def means(self) -> Tensor:
        """[layers, B, used, H, D]: mean keys of the frames held."""
        return self.pool.means(self.first, self.used)

    def bring(self, source: Tensor, first_slot: int) -> None:
        """Copy frames `source` [layers, B, k] into the k slots from `first_slot` on; where it is -1 the slot keeps its
        own. On a GPU nothing is read on the host."""
        for place, index in enumerate(source.unbind(2)):
            self.pool.replace(torch.where(index < 0, -1, first_slot + place), self.first + index)

    def state_dict(self) -> dict[str, Tensor]:
        return {}  # the pool has it all

    def load_state_dict(self, tensors: dict[str, Tensor], used: int) -> None:
        self.used = used


class Archive:
    """All frames, in host memory; in every layer and batch row the same. used: how many are held.

    On the device are their mean keys alone, of all heads. Host memory grows by one frame of K and V of all layers and
    batch rows with every frame added. With a GPU it is pinned: copies to it and from it are queued behind the work of
    the device, and the host waits only to read which frames were chosen.
    """

    def __init__(self, pool: FramePool):
        self.pool = pool
        self.frames: list[tuple[Tensor, Tensor]] = []  # key and value [layers, B, N, H, D]
        self.mean_buffer = pool.means(0, 0)

    @property
    def used(self) -> int:
        return len(self.frames)

    def add(self, source_slot: int) -> None:
        """Hold a copy of the frame in a slot of the pool."""
        mean = self.pool.means(source_slot, 1)
        if self.used == self.mean_buffer.shape[2]:  # twice the room each time: appending costs the same on average
            room = mean.new_zeros((*mean.shape[:2], max(8, 2 * self.used), *mean.shape[3:]))
            room[:, :, : self.used] = self.mean_buffer
            self.mean_buffer = room
        self.mean_buffer[:, :, self.used] = mean.squeeze(2)
        self.frames.append(tuple(self._host_copy(states) for states in self.pool.frame(source_slot)))

    def means(self) -> Tensor:
        """[layers, B, used, H, D]: mean keys of the frames held."""
        return self.mean_buffer[:, :, : self.used]

    def bring(self, source: Tensor, first_slot: int) -> None:
        """Copy frames `source` [layers, B, k] into the k slots from `first_slot` on; where it is -1 the slot keeps its
        own. Waits for the device to say which they are."""
        for place, index in enumerate(source.permute(2, 0, 1).tolist()):
            chosen = {frame for row in index for frame in row}
            if chosen == {-1}:
                continue
            if len(chosen) == 1:  # all layers and batch rows want the same frame: one copy
                self._write(first_slot + place, chosen.pop(), ())
                continue
            for layer, row in enumerate(index):
                for batch, frame in enumerate(row):
                    if frame >= 0:
                        self._write(first_slot + place, frame, (layer, batch))

    def _write(self, slot: int, frame: int, row: tuple[int, ...]) -> None:
        key, value = self.frames[frame]
        mean = self.pool.ranks.mine(self.mean_buffer[:, :, frame])
        self.pool.write(slot, key[row], value[row], mean[row], row)

    def _host_copy(self, states: Tensor) -> Tensor:
        host = torch.empty(states.shape, dtype=states.dtype, pin_memory=states.is_cuda)
        return host.copy_(states, non_blocking=True)

    def state_dict(self) -> dict[str, Tensor]:
        if not self.frames:
            return {}
        if self.mean_buffer.is_cuda:
            torch.cuda.synchronize(self.mean_buffer.device)  # the last copies to the host may be under way
        keys, values = (self.pool.ranks.collect(torch.stack(states)) for states in zip(*self.frames, strict=True))
        return {"archive.key": keys, "archive.value": values, "archive.mean": self.means()}

    def load_state_dict(self, tensors: dict[str, Tensor], used: int) -> None:
        mean, self.frames = self.mean_buffer, []
        self.mean_buffer = mean.new_empty((*mean.shape[:2], used, *mean.shape[3:]))
        if not used:
            return
        copy_exactly(self.mean_buffer, tensors, "archive.mean")
        key, value = self.pool.frame(0)
        frames = [torch.empty((used, *states.shape), dtype=states.dtype, device="cpu") for states in (key, value)]
        for states, name in zip(frames, ("archive.key", "archive.value"), strict=True):
            copy_exactly(states, tensors, name, self.pool.ranks)
        for pair in zip(*frames, strict=True):
            self.frames.append(tuple(states.pin_memory() if mean.is_cuda else states.clone() for states in pair))


def _sources(chosen: Tensor, frames: Tensor, shown: Tensor) -> Tensor:
    """Which of the held frames each bank slot takes, [layers, B, k]; -1 = it keeps the one that it shows.

    chosen, frames: [layers, B, k] indices and numbers of the frames to show. shown: [layers, B, k] numbers shown now.
    A chosen frame that is shown already stays where it is; the others take the slots that become free, in order. One
    that is chosen twice is shown twice.
    """
    slots, wanted = (numbers.unsqueeze(-1) for numbers in (shown, frames))
    same = (slots == wanted.mT) & (_repeats(shown).unsqueeze(-1) == _repeats(frames).unsqueeze(-2))
    stays, known = same.any(-1), same.any(-2)
    free = stays.int().argsort(dim=-1, stable=True)  # slots, those to be filled first
    new = known.int().argsort(dim=-1, stable=True)  # as many of the chosen first that are not shown yet
    taken = torch.where(known, -1, chosen).gather(-1, new)
    return torch.full_like(chosen, -1).scatter(-1, free, taken)


def _repeats(numbers: Tensor) -> Tensor:
    """[..., k]: how often each of the numbers [..., k] stands before its own place."""
    return (numbers.unsqueeze(-1) == numbers.unsqueeze(-2)).tril(-1).sum(-1)

"""Where past frames lie that are held but not shown: slots of the pool behind the window, or host memory."""

from __future__ import annotations

import torch
from torch import Tensor

from memflow.memory.slots import FramePool


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

    On the device are their mean keys alone. Host memory grows by one frame of K and V of all layers and batch rows with
    every frame added. With a GPU it is pinned: copies to it and from it are queued behind the work of the device, and
    the host waits only to read which frames were chosen.
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
        self.pool.write(slot, key[row], value[row], self.mean_buffer[:, :, frame][row], row)

    def _host_copy(self, states: Tensor) -> Tensor:
        host = torch.empty(states.shape, dtype=states.dtype, pin_memory=states.is_cuda)
        return host.copy_(states, non_blocking=True)

    def state_dict(self) -> dict[str, Tensor]:
        if not self.frames:
            return {}
        if self.mean_buffer.is_cuda:
            torch.cuda.synchronize(self.mean_buffer.device)  # the last copies to the host may be under way
        keys, values = zip(*self.frames, strict=True)
        return {"archive.key": torch.stack(keys), "archive.value": torch.stack(values), "archive.mean": self.means()}

    def load_state_dict(self, tensors: dict[str, Tensor], used: int) -> None:
        if not used:
            return
        self.mean_buffer = tensors["archive.mean"].to(self.mean_buffer.device)
        pinned = self.mean_buffer.is_cuda
        for key, value in zip(tensors["archive.key"], tensors["archive.value"], strict=True):
            self.frames.append(tuple(states.pin_memory() if pinned else states.clone() for states in (key, value)))

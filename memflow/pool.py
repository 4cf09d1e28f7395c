"""The pool: one K and one V buffer for all layers in frame-sized slots, `[ bank | sink | window ring | extra ]`.

The bank fills from right to left and the window from left to right, so that the frames attended to are always one
contiguous range of slots: attention reads a view. Softmax does not care for the order of keys, so the window is a ring.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memflow_kernels import Pool, replace_frame


class FramePool:
    """Slots of all layers and batch rows.

    key, value: [layers, B, slots * tokens_per_frame, heads, head_dim] in `dtype`. In memory a head's tokens follow one
    another, so that attention reads each head in one go: on two CPU cores it takes a tenth less time than through heads
    side by side.
    frame_mean: [layers, B, slots, heads, head_dim], float32 (float64 for a float64 pool), the mean key of each frame.
    """

    def __init__(
        self, *, bank, sink, window, extra, layers, batch, tokens_per_frame, heads, head_dim, dtype, device
    ) -> None:
        self.bank_slots, self.sink_slots, self.window_slots = bank, sink, window
        self.tokens_per_frame = tokens_per_frame
        slots = bank + sink + window + extra
        heads_first = (layers, batch, heads, slots * tokens_per_frame, head_dim)
        mean_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.key = torch.zeros(heads_first, dtype=dtype, device=device).transpose(2, 3)
        self.value = torch.zeros(heads_first, dtype=dtype, device=device).transpose(2, 3)
        self.frame_mean = torch.zeros((layers, batch, slots, heads, head_dim), dtype=mean_dtype, device=device)

    def slot_of(self, frame: int) -> int:
        """Slot of a latent frame that is in the sink or in the window."""
        if frame < self.sink_slots:
            return self.bank_slots + frame
        return self.bank_slots + self.sink_slots + (frame - self.sink_slots) % self.window_slots

    def layer(self, index: int) -> Pool:
        """The slots of one layer: key, value [B, slots * N, H, D], frame_mean [B, slots, H, D]."""
        return Pool(self.key[index], self.value[index], self.frame_mean[index])

    def bank(self, used: int) -> Pool:
        """The last `used` bank slots, layers and rows together: key, value [layers * B, used * N, H, D], frame_mean."""
        slots = slice(self.bank_slots - used, self.bank_slots)
        tokens = slice(slots.start * self.tokens_per_frame, slots.stop * self.tokens_per_frame)
        buffers = self.key[:, :, tokens], self.value[:, :, tokens], self.frame_mean[:, :, slots]
        return Pool(*(buffer.flatten(0, 1) for buffer in buffers))

    def replace(self, slot: int | Tensor, source_slot: int) -> None:
        """In every layer and row copy the frame in `source_slot` over `slot`, an int or [layers, B] on the device."""
        rows = Pool(self.key.flatten(0, 1), self.value.flatten(0, 1), self.frame_mean.flatten(0, 1))
        size, device = (rows.key.shape[0],), rows.key.device
        if isinstance(slot, int):
            slot = torch.full(size, slot, dtype=torch.int32, device=device)
        source = torch.full(size, source_slot, dtype=torch.int32, device=device)
        replace_frame(rows, slot.flatten().to(torch.int32), source)

    def clear_sink_and_window(self) -> None:
        first, end = self.bank_slots, self.bank_slots + self.sink_slots + self.window_slots
        self.frame_mean[:, :, first:end].zero_()
        for buffer in (self.key, self.value):
            buffer[:, :, first * self.tokens_per_frame : end * self.tokens_per_frame].zero_()

    def state_dict(self) -> dict[str, Tensor]:
        return {"pool.key": self.key, "pool.value": self.value, "pool.frame_mean": self.frame_mean}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        for name, buffer in self.state_dict().items():
            buffer.copy_(tensors[name])

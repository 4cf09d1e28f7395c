"""The pool: one K and one V buffer for all layers in frame-sized slots, `[ bank | sink | window ring | extra ]`.

The bank fills from right to left and the window from left to right, so that the frames attended to are always one
contiguous range of slots: attention reads a view. Softmax does not care for the order of keys, so the window is a ring.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from memflow.memory.places import Places, Rotation, Unplaced
from memflow.parallel import ALONE, Alone
from memflow_kernels import Pool, frame_means, replace_frame, rotate_keys_write


class FramePool:
    """Slots of all layers and batch rows.

    key, value: [layers, B, slots * tokens_per_frame, heads, head_dim] in `dtype`. In memory a head's tokens follow one
    another, so that attention reads each head in one go: on two CPU cores it takes a tenth less time than through heads
    side by side.
    frame_mean: [layers, B, slots, heads, head_dim], float32 (float64 for a float64 pool), the mean key of each frame.
    ranks: the processes that have some of the heads each; heads are those of this one.
    """

    def __init__(
        self, *, bank, sink, window, extra, layers, batch, tokens_per_frame, heads, head_dim, dtype, device, ranks=ALONE
    ) -> None:
        self.ranks = ranks
        self.bank_slots, self.sink_slots, self.window_slots = bank, sink, window
        self.tokens_per_frame = tokens_per_frame
        slots = bank + sink + window + extra
        heads_first = (layers, batch, heads, slots * tokens_per_frame, head_dim)
        mean_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        try:
            self.key = torch.zeros(heads_first, dtype=dtype, device=device).transpose(2, 3)
            self.value = torch.zeros(heads_first, dtype=dtype, device=device).transpose(2, 3)
        except RuntimeError as error:  # on a CPU torch has no class of its own for it
            size = 2 * math.prod(heads_first) * dtype.itemsize / 2**30
            raise MemoryError(f"the keys and values that a stream remembers take {size:,.1f} GiB") from error
        self.frame_mean = torch.zeros((layers, batch, slots, heads, head_dim), dtype=mean_dtype, device=device)
        self.block_tokens: int | None = None
        self.block_mean = self.frame_mean[:, :, :0]
        self.block_means: tuple[Tensor, ...] = ()

    def keep_block_means(self, tokens: int) -> None:
        """From now on keep the mean key of every `tokens` tokens of bank and sink too, as attention sees them:
        block_mean [layers, B, slots * blocks, H, D] in the dtype of frame_mean; block_means: the same by layer."""
        layers, batch, _, heads, head_dim = self.frame_mean.shape
        blocks = (self.bank_slots + self.sink_slots) * (self.tokens_per_frame // tokens)
        self.block_tokens = tokens
        self.block_mean = self.frame_mean.new_zeros((layers, batch, blocks, heads, head_dim))
        self.block_means = tuple(self.block_mean)

    def average_blocks(self) -> None:
        """Bring the means of the blocks up to date, once for all passes of a chunk, in which bank and sink stay."""
        if self.block_tokens is not None:
            tokens = self.tokens(0, self.bank_slots + self.sink_slots)
            means = frame_means(self.key[:, :, tokens].flatten(0, 1), self.block_tokens)
            self.block_mean.copy_(means.view_as(self.block_mean))

    @property
    def nbytes(self) -> int:
        """What all of it takes."""
        return sum(tensor.nbytes for tensor in self.buffers().values()) + self.block_mean.nbytes

    @property
    def first_extra_slot(self) -> int:
        return self.bank_slots + self.sink_slots + self.window_slots

    def slot_of(self, frame: int) -> int:
        """Slot of a latent frame that is in the sink or in the window."""
        if frame < self.sink_slots:
            return self.bank_slots + frame
        return self.bank_slots + self.sink_slots + (frame - self.sink_slots) % self.window_slots

    def tokens(self, first: int, count: int) -> slice:
        """The tokens of `count` slots from slot `first` on."""
        return slice(first * self.tokens_per_frame, (first + count) * self.tokens_per_frame)

    def layer(self, index: int) -> Pool:
        """The slots of one layer: key, value [B, slots * N, H, D], frame_mean [B, slots, H, D]."""
        return Pool(self.key[index], self.value[index], self.frame_mean[index])

    def unplaced(self, index: int) -> Unplaced | None:
        """What the clean pass of one layer writes beside its keys, where these are placed anew."""
        return None

    def keys(self, first: int, count: int) -> Tensor:
        """[layers * B, count * N, H, D]: the keys that a prompt's relevance is scored with, of slots from `first`."""
        return self.key[:, :, self.tokens(first, count)].flatten(0, 1)

    def means(self, first: int, count: int) -> Tensor:
        """[layers, B, count, H, D]: their mean keys, of all heads, for which what is held and shown is the same."""
        return self.ranks.all_heads(self.frame_mean[:, :, first : first + count])

    def replace(self, slot: int | Tensor, source_slot: int | Tensor) -> None:
        """In every layer and row copy the frame in `source_slot` over `slot`, each an int or [layers, B] on the device;
        a layer and row where either is -1 stays as it is."""
        slot, source = self._per_row(slot), self._per_row(source_slot)
        if slot.device.type == "cpu" and ((slot < 0) | (source < 0)).all():
            return  # as in most chunks, once the memory is full; a GPU is not asked
        self._replace(slot, source)

    def _replace(self, slot: Tensor, source: Tensor) -> None:
        """slot, source: [layers * B] int32."""
        rows = Pool(self.key.flatten(0, 1), self.value.flatten(0, 1), self.frame_mean.flatten(0, 1))
        replace_frame(rows, slot, source)

    def _per_row(self, slot: int | Tensor) -> Tensor:
        if isinstance(slot, int):
            rows = self.key.shape[0] * self.key.shape[1]
            return torch.full((rows,), slot, dtype=torch.int32, device=self.key.device)
        return slot.flatten().to(torch.int32)

    def frame(self, slot: int) -> tuple[Tensor, Tensor]:
        """Key and value [layers, B, N, H, D] of the frame in a slot, to be kept elsewhere; may be views."""
        tokens = self.tokens(slot, 1)
        return self.key[:, :, tokens], self.value[:, :, tokens]

    def write(self, slot: int, key: Tensor, value: Tensor, frame_mean: Tensor, row: tuple = ()) -> None:
        """Put a frame that `frame` gave, and the row of `means` of its heads, into a slot; row: () = all layers and
        batch rows, or (layer, batch row), with tensors of these alone. Copies from pinned memory do not wait for the
        device."""
        tokens = self.tokens(slot, 1)
        self.key[row][..., tokens, :, :].copy_(key, non_blocking=True)
        self.value[row][..., tokens, :, :].copy_(value, non_blocking=True)
        self.frame_mean[row][..., slot, :, :].copy_(frame_mean)

    def sink_and_window(self, stop: int) -> tuple[list[int], list[int]]:
        """Numbers of the frames in either when the frames before `stop` have been made."""
        window = range(max(self.sink_slots, stop - self.window_slots), stop)
        return list(range(min(stop, self.sink_slots))), list(window)

    def place_of(self, frame: int, stop: int) -> int:
        """Where attention sees a frame of a call over frames up to `stop` (places.py)."""
        return frame

    def place(self, stop: int) -> None:
        """Turn the keys to where calls up to frame `stop` see them; nothing to do where a place is a number."""

    def clear_sink_and_window(self) -> None:
        first, count = self.bank_slots, self.sink_slots + self.window_slots
        self.frame_mean[:, :, first : first + count].zero_()
        for buffer in (self.key, self.value):
            buffer[:, :, self.tokens(first, count)].zero_()

    def buffers(self) -> dict[str, Tensor]:
        """All that the pool is made of, [..., heads, D] each, by the names in a state."""
        return {"pool.key": self.key, "pool.value": self.value, "pool.frame_mean": self.frame_mean}

    def state_dict(self) -> dict[str, Tensor]:
        return {name: self.ranks.collect(buffer) for name, buffer in self.buffers().items()}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        for name, buffer in self.buffers().items():
            copy_exactly(buffer, tensors, name, self.ranks)


def copy_exactly(buffer: Tensor, tensors: dict[str, Tensor], name: str, ranks: Alone = ALONE) -> None:
    """Move tensor `name` of `tensors` into `buffer`; ValueError where it is missing or of another shape or dtype.

    ranks: processes that have some of the heads of `buffer` [..., H, D] each, and here move their own.
    """
    found = tensors.pop(name, None)
    shape = list(buffer.shape)
    if ranks.size > 1:
        shape[-2] *= ranks.size
    if found is None or list(found.shape) != shape or found.dtype != buffer.dtype:
        got = "nothing" if found is None else f"{found.dtype} {list(found.shape)}"
        raise ValueError(f"{name} must be {buffer.dtype} {shape}, got {got}")
    buffer.copy_(ranks.mine(found))


def note_frame(frames: Tensor, index: Tensor, prototype: int) -> None:
    """Write number `prototype` into `frames` [layers, B, n] at place `index` [layers, B]; nowhere where that is -1."""
    index = index.long().unsqueeze(-1)
    here = index.clamp(min=0)
    frames.scatter_(2, here, torch.where(index < 0, frames.gather(2, here), prototype))


class RelativeFramePool(FramePool):
    """Slots whose keys are placed anew before every chunk, always from what they are at place 0: no rounding adds up.

    Only the first 2P channels of a head turn with time (places.py); the others are the same at every place.
    still_key: [layers, B, slots * tokens_per_frame, heads, 2P], these channels at place 0, in the pool's dtype.
    still_mean: [layers, B, slots, heads, head_dim], the mean keys at place 0.
    Both are written by clean passes alone.
    """

    def __init__(self, *, rotation: Rotation, **sizes) -> None:
        super().__init__(**sizes)
        self.rotation = rotation
        self.places = Places(self.sink_slots, self.bank_slots, self.window_slots)
        self.channels = rotation.channels_of(self.key.shape[-1])
        layers, batch, tokens, heads, _ = self.key.shape
        still = self.key.new_zeros((layers, batch, heads, tokens, self.channels))
        self.still_key = still.transpose(2, 3)
        self.still_mean = torch.zeros_like(self.frame_mean)

    def unplaced(self, index: int) -> Unplaced:
        return Unplaced(self.still_key[index], self.still_mean[index])

    def keys(self, first: int, count: int) -> Tensor:
        tokens = self.tokens(first, count)
        at_zero = [self.still_key[:, :, tokens], self.key[:, :, tokens, :, self.channels :]]
        return torch.cat(at_zero, -1).flatten(0, 1)

    def means(self, first: int, count: int) -> Tensor:
        return self.ranks.all_heads(self.still_mean[:, :, first : first + count])

    def _replace(self, slot: Tensor, source: Tensor) -> None:
        super()._replace(slot, source)
        key, mean = self.still_key.flatten(0, 1), self.still_mean.flatten(0, 1)
        # The op moves a key, a value and a mean: what has no value goes in its place once more, where it is anyway.
        replace_frame(Pool(key, key, mean[..., : self.channels]), slot, source)
        replace_frame(Pool(mean, mean, mean), slot, source)

    def frame(self, slot: int) -> tuple[Tensor, Tensor]:
        tokens = self.tokens(slot, 1)
        return self.keys(slot, 1).unflatten(0, self.key.shape[:2]), self.value[:, :, tokens]

    def write(self, slot: int, key: Tensor, value: Tensor, frame_mean: Tensor, row: tuple = ()) -> None:
        super().write(slot, key, value, frame_mean, row)
        tokens = self.tokens(slot, 1)
        self.still_key[row][..., tokens, :, :].copy_(key[..., : self.channels], non_blocking=True)
        self.still_mean[row][..., slot, :, :].copy_(frame_mean)

    def place_of(self, frame: int, stop: int) -> int:
        return self.places.of_window(frame, stop)

    def place(self, stop: int) -> None:
        sink, window = self.sink_and_window(stop)
        places = [self.places.of_bank(slot) for slot in range(self.bank_slots)]
        places += [self.places.of_sink(frame, stop) for frame in sink]
        places += [self.places.of_window(frame, stop) for frame in sorted(window, key=self.slot_of)]
        places = torch.tensor(places).to(self.key.device, non_blocking=True)
        rows = Pool(self.key.flatten(0, 1), self.value.flatten(0, 1), self.frame_mean.flatten(0, 1))
        theta = self.rotation.theta
        rotate_keys_write(self.still_key.flatten(0, 1), self.still_mean.flatten(0, 1), places, pool=rows, theta=theta)

    def buffers(self) -> dict[str, Tensor]:
        return {**super().buffers(), "pool.still_key": self.still_key, "pool.still_mean": self.still_mean}

"""Where on the time axis attention sees a frame: its place, the position that its keys are turned to.

`positions="absolute"`: a frame's place is its number in the stream. `positions="relative"`: places depend on the
distance to the newest frame alone and stay below sink + bank + window, however long the story is:

    a call (denoising, clean or re-encoding pass) over frames up to, not including, `stop` sees
    window frame f, the frames of the call among them, at   sink + bank + window - (stop - f)
    bank slot j                                        at   sink + j
    sink frame i                                       at   max(sink + bank + window - (stop - i), i)

with `bank` the places that attention sees (`MemoryConfig.bank_frames`), however many frames are held. So the current
chunk of F frames is always at C to C + F - 1 with C = sink + bank + window - F, the window at its true distance before
it, and the sink at its true distance until it comes to rest on its own frame numbers. A memory's place is that of its
slot: which slot it takes says nothing about its age, and a model should be trained with any.

The pass that encodes the window again at a prompt switch before frame `start` is a call like others: its stop is
`start`, so that it sees what the last clean pass saw.

Keys are kept as they are at place 0: normed, turned by row and column, not by time. `place_keys` turns them by time,
which rounds every number just as often as `memflow_kernels.qk_norm_rope` at that place does, since a channel pair turns
with one axis only. Relevance to a prompt, similarity and everything else that compares memories uses keys at
place 0, so that it does not change with age; activation (top_k) uses the keys that attention sees.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from memflow_kernels import rotate_keys


class Places(NamedTuple):
    """Relative places for `sink`, `bank` and `window` frames as in `MemoryConfig`."""

    sink: int
    bank: int
    window: int

    @property
    def count(self) -> int:
        """All places are from 0 to below this."""
        return self.sink + self.bank + self.window

    def of_window(self, frame: int, stop: int) -> int:
        """Place of a frame of the window, or of the call itself, in a call over frames up to `stop`."""
        return self.count - (stop - frame)

    def of_sink(self, frame: int, stop: int) -> int:
        """Place of a sink frame in a call over frames up to `stop`."""
        return max(self.of_window(frame, stop), frame)

    def of_bank(self, slot: int) -> int:
        """Place of bank slot `slot`, 0 to bank - 1, in every call."""
        return self.sink + slot


class Unplaced(NamedTuple):
    """What a layer's clean passes keep of their keys at place 0, for S slots of N tokens.

    key: [B, S*N, H, channels_in_time(D)], the channels that turn with time. frame_mean: [B, S, H, D].
    """

    key: Tensor
    frame_mean: Tensor

    def write(self, key: Tensor, slots: Tensor) -> None:
        """Keys at place 0 [B, n, N, H, D] into `slots` [n], none of them -1."""
        frames = self.key.unflatten(1, (self.frame_mean.shape[1], -1))
        frames[:, slots.long()] = key[..., : self.key.shape[-1]]
        self.frame_mean[:, slots.long()] = key.mean(2, dtype=self.frame_mean.dtype)


class Rotation(NamedTuple):
    """How a model's keys turn with time, in pairs of neighbouring channels (2i, 2i + 1).

    Attributes:
        channels: of a head that turn with time, the first ones; the others turn with row and column, or not at all.
            None: as Wan 2.1 divides a head of D channels, 2p - 4 floor(p / 3) of them, p = D / 2.
        theta: base: pair i of P turns by place * theta^(-i / P).
    """

    channels: int | None = None
    theta: float = 10000.0

    def channels_of(self, head_dim: int) -> int:
        """Channels of a head of `head_dim` that turn with time."""
        pairs = head_dim // 2
        return 2 * (pairs - 2 * (pairs // 3)) if self.channels is None else self.channels


def place_keys(key: Tensor, places: Tensor, rotation: Rotation = Rotation()) -> Tensor:  # noqa: B008 (immutable)
    """Keys at place 0 -> the same keys at `places`; differentiable. Frame means are placed in the same way.

    Args:
        key: [..., H, D].
        places: integers, one per key, of a shape that broadcasts with key's leading dimensions: keys [B, F, N, H, D]
            take places [F, 1] or [B, F, 1].
        rotation: how the model's keys turn.

    Returns:
        The placed keys, of key's shape and dtype; arithmetic in float32 (float64 for float64).
    """
    *leading, heads, head_dim = key.shape
    channels, theta = rotation.channels_of(head_dim), rotation.theta
    tokens = leading[-1] if places.shape[-1] == 1 else 1
    places = places.squeeze(-1).expand(leading[:-1]) if tokens > 1 else places.expand(leading)
    flat = key.reshape(1, -1, heads, head_dim)
    return rotate_keys(flat, places.reshape(-1), tokens_per_frame=tokens, channels=channels, theta=theta).view(
        key.shape
    )

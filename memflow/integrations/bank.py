"""A caller's bank, read where it is: past frames that the caller's own code chooses and keeps in order.

The caller keeps the dictionary {"k", "v": [B, places * N, H, D], "k_new", "v_new": [B, N, H, D], "global_end_index",
"local_end_index"}: the pending prototype lies in "k_new" and "v_new", indices are in tokens and count the prototypes
recorded so far. Choosing who stays is the caller's code, which runs between the calls.
"""

from __future__ import annotations

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from memflow.integrations.mirror import Mirror, version
from memflow_kernels import frame_means

_KNOWN: WeakIdKeyDictionary = WeakIdKeyDictionary()  # key buffer -> FrameBank


class FrameBank:
    """What is known of one layer's bank besides its frames."""

    def __init__(self, tokens: int):
        self.tokens = tokens
        self.global_end, self.local_end = Mirror("global_end_index"), Mirror("local_end_index")
        self.means: tuple[int | None, Tensor] | None = None

    @classmethod
    def of(cls, kv_bank: dict, tokens: int) -> FrameBank:
        """The state of a caller's bank."""
        bank = _KNOWN.get(kv_bank["k"])
        if bank is None:
            bank = _KNOWN[kv_bank["k"]] = cls(tokens)
        return bank

    def visible(self, kv_bank: dict) -> int:
        """Frames that attention sees: as many as were recorded, at most as many as there are places."""
        return min(self.local_end.read(kv_bank), kv_bank["k"].shape[1]) // self.tokens

    def frame_means(self, kv_bank: dict, frames: int) -> Tensor:
        """[B, frames, H, D]: mean keys, computed again when the caller has written into the bank."""
        key = kv_bank["k"]
        count = version(key)
        if self.means is None or count is None or self.means[0] != count or self.means[1].shape[1] != frames:
            self.means = count, frame_means(key[:, : frames * self.tokens], self.tokens)
        return self.means[1]

    def record(self, kv_bank: dict, key: Tensor, value: Tensor, recorded: int) -> None:
        """Make `key` and `value` [B, N, H, D] the pending prototype, number `recorded`."""
        kv_bank["k_new"].copy_(key)
        kv_bank["v_new"].copy_(value)
        self.global_end.write(kv_bank, recorded * self.tokens)
        self.local_end.write(kv_bank, recorded * self.tokens)

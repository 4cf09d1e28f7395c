"""A caller's bank, read where it is: past frames that the caller's own code chooses and keeps in order.

The caller keeps the dictionary {"k", "v": [B, places * N, H, D], "k_new", "v_new": [B, N, H, D], "global_end_index",
"local_end_index"}: the pending prototype lies in "k_new" and "v_new", indices are in tokens and count the prototypes
recorded so far. Choosing who stays is the caller's code, which runs between the calls.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from memflow.integrations.cache import GLOBAL, LOCAL
from memflow.integrations.mirror import Beside, Mirror, version
from memflow_kernels import frame_means

if TYPE_CHECKING:
    from memflow.integrations.settings import Settings

_KNOWN: Beside[FrameBank] = Beside()  # by key buffer


class FrameBank:
    """What is known of one layer's bank besides its frames."""

    def __init__(self, tokens: int):
        self.tokens = tokens
        self.global_end, self.local_end = Mirror(GLOBAL), Mirror(LOCAL)
        self.means: tuple[int | None, Tensor] | None = None

    @classmethod
    def of(cls, kv_bank: dict, tokens: int) -> FrameBank:
        """The state of a caller's bank."""
        bank = _KNOWN.get(kv_bank["k"])
        if bank is None or bank.tokens != tokens:
            bank = _KNOWN.set(kv_bank["k"], cls(tokens))
        return bank

    def ends(self, kv_bank: dict, stop: int, settings: Settings) -> tuple[int, int]:
        """Its indices in frames once a call that ends before frame `stop` has been stored: prototypes are counted as
        one per `record_interval` chunks since the beginning of the video."""
        recorded = (stop // settings.chunk - 1) // settings.record_interval + 1
        before = self.local_end.read(kv_bank) - self.global_end.read(kv_bank)
        return recorded, before // self.tokens + recorded

    def visible(self, kv_bank: dict, start: int, stop: int, settings: Settings, is_recache: bool) -> int:
        """Frames that attention sees in a call from `start` to `stop`: those recorded before it."""
        _, recorded = self.ends(kv_bank, stop, settings)
        if not is_recache and start // settings.chunk % settings.record_interval == 0:
            recorded -= 1  # its own prototype
        return max(0, min(recorded, kv_bank["k"].shape[1] // self.tokens))

    def frame_means(self, kv_bank: dict, frames: int) -> Tensor:
        """[B, frames, H, D]: mean keys, computed again when the caller has written into the bank."""
        key = kv_bank["k"]
        count = version(key)
        if self.means is None or count is None or self.means[0] != count or self.means[1].shape[1] != frames:
            self.means = count, frame_means(key[:, : frames * self.tokens], self.tokens)
        return self.means[1]

    def record(self, kv_bank: dict, key: Tensor, value: Tensor) -> None:
        """Make `key` and `value` [B, N, H, D] the pending prototype."""
        kv_bank["k_new"].copy_(key)
        kv_bank["v_new"].copy_(value)

    def count(self, kv_bank: dict, ends: tuple[int, int]) -> None:
        """Set its indices, in frames."""
        self.global_end.write(kv_bank, ends[0] * self.tokens)
        self.local_end.write(kv_bank, ends[1] * self.tokens)

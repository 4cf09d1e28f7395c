"""What a self-attention does with its cache, as the module itself says it: its sink, its window, what it activates."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from memflow.memory.config import MemoryConfig

_READ = ("sink_size", "global_sink_size", "local_attn_size", "max_attention_size", "record_interval", "SMA")
_TOP_K = ("top_k", "topk", "sma_top_k", "SMA_top_k")
PUBLISHED_TOP_K = 3  # of SMA, which the published module has as a number in its code


class Settings(NamedTuple):
    """Sizes in frames, unless they are said to be in tokens.

    sink: the first frames of the cache, kept for ever; None where nobody said.
    rolls: whether a full cache gives up its oldest frames; one that does not is as long as the video.
    seen_tokens: the most tokens of the cache that attention sees; None = all.
    top_k: frames of sink and bank that a head keeps; None = all.
    record_interval: every how many chunks a prototype is recorded; None where nobody said.
    chunk: frames that are denoised together.
    """

    sink: int | None
    rolls: bool
    seen_tokens: int | None
    top_k: int | None
    record_interval: int | None
    chunk: int


class ModuleSettings:
    """Reads them from one module; again whenever one of its attributes has changed since.

    name: of the module, for errors. memory: what the user says of it, or None. owner: the module with the number of
    frames per chunk, or None. checked: whether the module's own code runs beside ours in the first calls.
    """

    def __init__(
        self, name: str, module: nn.Module, memory: MemoryConfig | None, owner: nn.Module | None, checked: bool
    ):
        self.name, self.module, self.memory, self.owner, self.checked = name, module, memory, owner, checked
        self.names = tuple(attribute for attribute in (*_READ, *_TOP_K) if hasattr(module, attribute))
        self._attributes: Callable = operator.attrgetter(*self.names) if self.names else lambda _: ()
        self.seen: object = None
        self.settings: Settings | None = None

    def read(self, has_indices: bool, has_bank: bool) -> Settings:
        """Raises ValueError where `memory` disagrees with the module, or where nobody says what a call needs: one with
        a cache that counts what it holds, or with a bank."""
        seen = self._attributes(self.module)
        if self.settings is None or seen != self.seen:
            values = dict(zip(self.names, seen if len(self.names) > 1 else (seen,), strict=True)) if self.names else {}
            self.settings = self._settings(values)
            self.seen = seen
        if self.settings.sink is None and has_indices and self.settings.rolls:
            self._ask_for("sink_size", "sink_frames=..., local_frames=...", "how many of the first frames stay")
        if self.settings.record_interval is None and has_bank:
            self._ask_for("record_interval", "record_interval=...", "every how many chunks the bank records")
        return self.settings

    def _ask_for(self, attribute: str, arguments: str, meaning: str) -> None:
        raise ValueError(
            f"{self.name}.{attribute}: is missing, so {meaning} cannot be read: say "
            f"memory=MemoryConfig.published({arguments})"
        )

    def _settings(self, values: dict) -> Settings:
        window = values.get("local_attn_size")
        rolls = window is None or window != -1
        self._agrees("sink_frames", "sink_size", values.get("sink_size"))
        if isinstance(window, int) and window > 0 and self.memory is not None:
            given = self.memory.sink_frames + self.memory.window_frames
            if given != window:
                self._disagrees(f"local_frames is {given} (sink_frames + window_frames)", "local_attn_size", window)
        self._agrees("record_interval", "record_interval", values.get("record_interval"))
        limit = values.get("max_attention_size")
        return Settings(
            sink=self._sink(values),
            rolls=rolls,
            seen_tokens=limit if isinstance(limit, int) and limit > 0 else None,
            top_k=self._top_k(values),
            record_interval=values.get("record_interval", self.memory and self.memory.record_interval),
            chunk=self._chunk(),
        )

    def _sink(self, values: dict) -> int | None:
        sink = values.get("sink_size")
        if sink is None:
            return self.memory and self.memory.sink_frames
        return max(int(sink), int(values.get("global_sink_size") or 0))

    def _top_k(self, values: dict) -> int | None:
        given = None if self.memory is None else self.memory.top_k
        if "SMA" not in values:
            return given
        if not values["SMA"]:
            if given is not None:
                self._disagrees(f"top_k is {given}", "SMA", values["SMA"])
            return None
        named = next((values[name] for name in _TOP_K if isinstance(values.get(name), int)), None)
        if named is not None and given not in (None, named):
            self._disagrees(f"top_k is {given}", "top_k", named)
        if named is None and given is None and not self.checked:
            raise ValueError(
                f"{self.name}.SMA: is on, and how many frames a head keeps cannot be read: say "
                "memory=MemoryConfig.published(top_k=...), or let check=True confirm the published 3"
            )
        return named or given or PUBLISHED_TOP_K

    def _chunk(self) -> int:
        """The published module has 3 in its code, and the model around it 1 until a pipeline sets it."""
        named = getattr(self.owner, "num_frame_per_block", 1) if self.owner is not None else 1
        if self.memory is None:
            return named if named > 1 else MemoryConfig.frames_per_chunk
        if named > 1:
            self._agrees("frames_per_chunk", "num_frame_per_block", named)
        return self.memory.frames_per_chunk

    def _agrees(self, field: str, attribute: str, value) -> None:
        if self.memory is not None and value is not None and getattr(self.memory, field) != value:
            self._disagrees(f"{field} is {getattr(self.memory, field)}", attribute, value)

    def _disagrees(self, said: str, attribute: str, value) -> None:
        raise ValueError(
            f"memory: {said}, and {self.name}.{attribute} is {value!r}. patch() reads the module: leave memory out, or "
            "say the same"
        )

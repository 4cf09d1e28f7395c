"""What a stream remembers: sink, bank and window of past frames in one pool, nothing ever rolled or concatenated.

`FrameMemory` is the memory as the paper (arXiv 2512.14699) means it; `memflow.published.PublishedMemory` repeats the
published code exactly. Both speak in absolute latent-frame numbers and never read a device tensor on the host.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from memflow.policies import POLICIES, BankView
from memflow.pool import FramePool
from memflow_kernels import Pool, prompt_relevance

PUBLISHED = ("interactive", "single")  # the published pipelines


@dataclass(frozen=True)
class MemoryConfig:
    """What is held and what is activated. Every count is in latent frames.

    frames_per_chunk: frames denoised together.
    sink_frames: the first frames of the stream, kept for ever.
    window_frames: the newest frames, the current chunk included, the sink not.
    bank_frames: places for past frames that the prompts call for.
    top_k: candidate frames (bank + sink) that each head attends to; None = all of them.
    policy: which frame gives its place when the bank is full: one of `memflow.policies.POLICIES`.
    aggregate: how a relevance is summed up, "mean" or "softmax" (see `memflow_kernels.prompt_relevance`).
    record_interval: every how many chunks a prototype (first frame of the chunk) is recorded.
    published: None, or the name of the published pipeline ("interactive", "single") whose behaviour is repeated
        exactly, its known defects included; see `MemoryConfig.reference`.
    global_sink: published behaviour only: False empties sink and window at a prompt switch.
    """

    frames_per_chunk: int = 3
    sink_frames: int = 3
    window_frames: int = 9
    bank_frames: int = 3
    top_k: int | None = None
    policy: str = "prompt"
    aggregate: str = "mean"
    record_interval: int = 1
    published: str | None = None
    global_sink: bool = True

    def __post_init__(self):
        for name, least in (("frames_per_chunk", 1), ("sink_frames", 0), ("bank_frames", 0), ("record_interval", 1)):
            _require_count(name, getattr(self, name), least)
        _require_count("window_frames", self.window_frames, self.frames_per_chunk)
        if self.top_k is not None:
            _require_count("top_k", self.top_k, 1)
        _require_one_of("policy", self.policy, tuple(POLICIES))
        _require_one_of("aggregate", self.aggregate, ("mean", "softmax"))
        if self.published is not None:
            _require_one_of("published", self.published, PUBLISHED)
            _require_count("bank_frames", self.bank_frames, 1)
            _require_one_of("policy", self.policy, ("prompt",))
            _require_one_of("aggregate", self.aggregate, ("mean",))
        if self.policy == "none" and self.bank_frames:
            object.__setattr__(self, "bank_frames", 0)

    @classmethod
    def reference(
        cls,
        mode: str = "interactive",
        *,
        local_frames: int = 12,
        sink_frames: int = 3,
        record_interval: int = 3,
        **rest,
    ) -> MemoryConfig:
        """The published code, for its checkpoints and the goldens. `local_frames` counts the sink, as it does there."""
        _require_one_of("mode", mode, PUBLISHED)
        chunk = rest.get("frames_per_chunk", cls.frames_per_chunk)
        _require_count("sink_frames", sink_frames, 0)
        _require_count("local_frames (the sink included)", local_frames, sink_frames + chunk)
        return cls(
            published=mode,
            sink_frames=sink_frames,
            window_frames=local_frames - sink_frames,
            record_interval=record_interval,
            **rest,
        )

    def create(self, **shape) -> FrameMemory:
        """The memory of one stream; `shape` as in `FrameMemory`."""
        if self.published is None:
            return FrameMemory(self, **shape)
        from memflow.published import PublishedMemory

        return PublishedMemory(self, **shape)

    def to_dict(self) -> dict:
        return asdict(self)


class Prompt(NamedTuple):
    """A prompt as the transformer's layers see it.

    key, value: [layers, B, T, H, D], the cross-attention keys (normed, not rotated) and values.
    mask: [B, T] bool, True where a token counts (padding: False).
    """

    key: Tensor
    value: Tensor
    mask: Tensor


class Pass(NamedTuple):
    """One call of the transformer as the attention processors need it.

    pools: the layers' pools. prompt: what cross-attention attends to. grid: token rows and columns of a frame.
    start_frame: [1] int64 on the device. slots: [n] int32, where the frames of the call are written (-1: nowhere).
    first_slot, end_slot: the slots attended to. candidates: how many of them compete. top_k: places they compete for.
    """

    pools: tuple[Pool, ...]
    prompt: Prompt | None
    grid: tuple[int, int]
    start_frame: Tensor
    slots: Tensor
    first_slot: int
    end_slot: int
    candidates: int
    top_k: int | None

    @property
    def chooses(self) -> bool:
        """Whether heads attend to a choice of the candidates in this call."""
        return self.top_k is not None and self.top_k < self.candidates


class MemorySnapshot(NamedTuple):
    """What the memory holds, on the host. held [layers, B, bank]: frame numbers, -1 = empty place;
    relevance [layers, B, bank]: to the prompt in force, NaN = empty; sink, window: frame numbers."""

    held: np.ndarray
    relevance: np.ndarray
    sink: list[int]
    window: list[int]


class FrameMemory:
    """The frames that one stream holds, for all layers and batch rows, and the update before each chunk.

    Before a chunk the frames that it will overwrite leave the window; the prototype among them enters the bank, and a
    full bank gives up the frame that the policy names. So a frame is never held twice, a copy never fills the bank,
    and one update moves one frame.

    layers, batch, heads, head_dim: sizes of the model. grid: (rows, columns) of tokens in a frame.
    """

    extra_slots = 0

    def __init__(self, config: MemoryConfig, *, layers, batch, heads, head_dim, grid, dtype, device):
        self.config = config
        self.grid = tuple(grid)
        self.pool = FramePool(
            bank=config.bank_frames,
            sink=config.sink_frames,
            window=config.window_frames,
            extra=self.extra_slots,
            layers=layers,
            batch=batch,
            tokens_per_frame=grid[0] * grid[1],
            heads=heads,
            head_dim=head_dim,
            dtype=dtype,
            device=device,
        )
        self.layer_pools = tuple(self.pool.layer(i) for i in range(layers))
        self.held = torch.full((layers, batch, config.bank_frames), -1, dtype=torch.int64, device=device)
        self.bank_used = 0
        self.updated_for = -1
        self.policy = POLICIES[config.policy]()

    # -- one chunk ---------------------------------------------------------------------------------------------------

    def switch_prompt(self, start: int, prompt: Prompt) -> None:
        """`prompt` is about to start with the chunk at frame `start`; the window has not been re-encoded yet."""

    def update(self, start: int, prompt: Prompt) -> None:
        """Make the memory ready for the chunk that begins at frame `start`, under the prompt of that chunk."""
        if self.updated_for == start:
            return
        self.updated_for = start
        prototype = self._leaving_prototype(start)
        if prototype is None:
            return
        source = self.pool.slot_of(prototype)
        if self.bank_used < self.config.bank_frames:
            self.bank_used += 1
            slot = self.config.bank_frames - self.bank_used
            self.pool.replace(slot, source)
            self.held[..., slot] = prototype
        else:
            slot = self.policy.victim(self._bank(prompt))
            self.pool.replace(slot, source)
            self.held.scatter_(2, slot.long().unsqueeze(-1), prototype)

    def pass_over(self, start: int, frames: int, prompt: Prompt | None) -> Pass:
        """The context of a call over `frames` frames from frame `start` on, the newest of the stream."""
        config, pool, stop = self.config, self.pool, start + frames
        device = pool.key.device
        oldest = stop - config.window_frames
        slots = [pool.slot_of(f) if f < config.sink_frames or f >= oldest else -1 for f in range(start, stop)]
        bank = self.visible_bank()
        return Pass(
            pools=self.layer_pools,
            prompt=prompt,
            grid=self.grid,
            start_frame=torch.full((1,), start, dtype=torch.int64, device=device),
            slots=torch.tensor(slots, dtype=torch.int32).to(device, non_blocking=True),
            first_slot=config.bank_frames - bank,
            end_slot=config.bank_frames + min(stop, config.sink_frames + config.window_frames),
            candidates=self._candidates(start, stop, bank),
            top_k=config.top_k,
        )

    def end_chunk(self, start: int) -> None:
        """The clean pass over the chunk at frame `start` has been made."""

    def recache_span(self, start: int) -> tuple[int, int]:
        """(first frame, number of frames) that a prompt switch before frame `start` re-encodes.

        The frames of the window that stay in it. Those that the chunk overwrites keep, as prototypes for the bank, the
        keys and values of their own prompt.
        """
        config = self.config
        frames = max(0, min(config.window_frames - config.frames_per_chunk, start - config.sink_frames))
        return start - frames, frames

    # -- what is held ------------------------------------------------------------------------------------------------

    def visible_bank(self) -> int:
        """Bank frames that attention sees."""
        return self.bank_used

    def snapshot(self, stop: int, prompt: Prompt) -> MemorySnapshot:
        """What is held when the frames before `stop` have been made. Waits for the device: for reports."""
        config = self.config
        held = self.held.cpu()
        relevance = torch.full(held.shape, float("nan"))
        if self.bank_used:
            relevance[..., config.bank_frames - self.bank_used :] = self.relevance(prompt).float().cpu()
        sink = list(range(min(stop, config.sink_frames)))
        window = list(range(max(config.sink_frames, stop - config.window_frames), stop))
        return MemorySnapshot(held.numpy(), relevance.numpy(), sink, window)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Everything that a resumed stream needs: tensors and whole numbers apart."""
        return {**self.pool.state_dict(), "held": self.held}, {name: getattr(self, name) for name in self._counters()}

    def load_state_dict(self, tensors: dict[str, Tensor], counters: dict[str, int]) -> None:
        self.pool.load_state_dict(tensors)
        self.held.copy_(tensors["held"])
        for name in self._counters():
            setattr(self, name, counters[name])

    def _counters(self) -> tuple[str, ...]:
        return ("bank_used", "updated_for")

    def _bank(self, prompt: Prompt) -> BankView:
        pool = self.pool.bank(self.bank_used)
        return BankView(held=self.held, pool=pool, relevance=lambda: self.relevance(prompt))

    def relevance(self, prompt: Prompt) -> Tensor:
        """[layers, B, bank_used] float32: relevance of the held frames to the prompt; padding tokens do not count."""
        return self._relevance(prompt.key, prompt.mask.repeat(prompt.key.shape[0], 1))

    def _relevance(self, text_key: Tensor, text_mask: Tensor | None) -> Tensor:
        bank = self.pool.bank(self.bank_used)
        if self.config.aggregate == "mean":
            frames = {"frame_mean": bank.frame_mean}
        else:
            frames = {"key": bank.key, "tokens_per_frame": self.pool.tokens_per_frame}
        scores = prompt_relevance(
            text_key.flatten(0, 1), text_mask=text_mask, aggregate=self.config.aggregate, **frames
        )
        return scores.unflatten(0, text_key.shape[:2])

    def _leaving_prototype(self, start: int) -> int | None:
        """The recorded frame that the chunk at `start` will overwrite, if there is one and a bank to take it."""
        config = self.config
        chunk, leaving = config.frames_per_chunk, start - config.window_frames
        prototype = -(-leaving // chunk) * chunk
        recorded = prototype % (chunk * config.record_interval) == 0
        inside = max(leaving, config.sink_frames) <= prototype < leaving + chunk
        return prototype if config.bank_frames and recorded and inside else None

    def _candidates(self, start: int, stop: int, bank: int) -> int:
        # While the sink itself is being made its frames are the chunk's own: all of them are seen.
        return bank + self.config.sink_frames if start >= self.config.sink_frames else 0


def _require_count(name: str, value, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")


def _require_one_of(name: str, value, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")

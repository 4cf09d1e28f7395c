"""What a stream remembers: sink, bank and window of past frames in one pool, nothing ever rolled or concatenated.

`FrameMemory` is the memory as the paper (arXiv 2512.14699) means it; `PublishedMemory` (published.py) repeats
the published code exactly. Both speak in absolute latent-frame numbers and never read a device tensor on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from memflow.errors import MemFlowError
from memflow.memory.attention import Pass
from memflow.memory.places import Rotation
from memflow.memory.policies import POLICIES, Held
from memflow.memory.slots import FramePool, RelativeFramePool, copy_exactly, note_frame
from memflow.memory.views import Prompt, policy_view, relevance_of, snapshot_of
from memflow.parallel import ALONE, Alone
from memflow.parallel.ranks import require_division

if TYPE_CHECKING:
    from memflow.memory.config import MemoryConfig


class FrameMemory:
    """The frames that one stream holds, for all layers and batch rows, and the update before each chunk.

    Before a chunk the frames that it will overwrite leave the window; the prototype among them enters the bank, and a
    full bank gives up the frame that the policy names. So a frame is never held twice, a copy never fills the bank,
    and one update moves one frame. Attention sees all that is held; `HeldMemory` (held.py) holds more.

    Args:
        config: what is held, shown and activated.
        layers, batch, heads, head_dim: sizes of the model.
        grid: rows and columns of tokens in a frame.
        dtype: of keys and values.
        device: where they lie.
        seeds: one per batch row, for the policies that draw; zeros where not given.
        rotation: how the model's keys turn with time; None: they do not.
        ranks: the processes that make the story together, each with a part of the heads. What is held and shown is
            the same in all of them: it is chosen by means of all heads.

    Raises:
        ValueError: relative positions for keys that do not turn.
        MemFlowError: an activation_block that does not divide a frame; processes that do not divide heads and tokens.
    """

    extra_slots = 0
    padding_counts = False  # in relevance
    counters: ClassVar[tuple[str, ...]] = ("bank_used", "updated_for")  # whole numbers of a state

    def __init__(
        self,
        config: MemoryConfig,
        *,
        layers: int,
        batch: int,
        heads: int,
        head_dim: int,
        grid: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device | str,
        seeds: Sequence[int] = (),
        rotation: Rotation | None = Rotation(),  # noqa: B008 (immutable)
        ranks: Alone = ALONE,
    ):
        self.config = config
        self.grid = tuple(grid)
        self.ranks = ranks
        if ranks.size > 1:
            require_division(ranks.size, heads, self.call_tokens())
        self.rotation = rotation
        relative = config.positions == "relative"
        if relative and rotation is None:
            raise ValueError("positions must be 'absolute' for a model whose keys do not turn with time")
        tokens, block = grid[0] * grid[1], config.activation_block
        if block is not None and tokens % block:
            frame = f"the {tokens} tokens of a frame ({grid[0]} rows of {grid[1]})"
            raise MemFlowError(f"activation_block must divide {frame}, got {block}")
        make_pool = partial(RelativeFramePool, rotation=rotation) if relative else FramePool
        self.pool = make_pool(
            bank=config.bank_frames,
            sink=config.sink_frames,
            window=config.window_frames,
            extra=self.extra_slots,
            layers=layers,
            batch=batch,
            tokens_per_frame=tokens,
            heads=heads // ranks.size,
            head_dim=head_dim,
            dtype=dtype,
            device=device,
            ranks=ranks,
        )
        if block is not None:
            self.pool.keep_block_means(block)
        self.layer_pools = tuple(self.pool.layer(i) for i in range(layers))
        self.unplaced = tuple(self.pool.unplaced(i) for i in range(layers))
        self.shown = torch.full((layers, batch, config.bank_frames), -1, dtype=torch.int64, device=device)
        self.bank_used = 0
        self.updated_for = -1
        self.scene_starts = torch.zeros(0, dtype=torch.int64, device=device)
        self.policy = POLICIES[config.policy]()
        self.seeds = torch.tensor(list(seeds) or [0] * batch, dtype=torch.int64, device=device)

    # -- one chunk ---------------------------------------------------------------------------------------------------

    def switch_prompt(self, start: int, prompt: Prompt) -> None:
        """`prompt` is about to start with the chunk at frame `start`, and a scene with it; the window has not been
        re-encoded yet."""
        begins = torch.full((1,), start, dtype=torch.int64, device=self.scene_starts.device)
        self.scene_starts = torch.cat([self.scene_starts, begins])
        self.pool.average_blocks()  # the sink may have been written since the last chunk began

    def update(self, start: int, prompt: Prompt) -> None:
        """Make the memory ready for the chunk that begins at frame `start`, under the prompt of that chunk."""
        if self.updated_for == start:
            return
        self.updated_for = start
        prototype = self.config.leaving_prototype(start)
        if prototype is not None:
            self.admit(prototype, prompt)
        self.recall(prompt)
        self.pool.place(start + self.config.frames_per_chunk)
        self.pool.average_blocks()

    def admit(self, prototype: int, prompt: Prompt) -> None:
        """Hold frame `prototype` of the window."""
        source = self.pool.slot_of(prototype)
        if self.bank_used < self.config.bank_frames:
            self.bank_used += 1
            slot = self.config.bank_frames - self.bank_used
            self.pool.replace(slot, source)
            self.shown[..., slot] = prototype
        else:
            slot = self.policy.victim(self._held(prompt), self._newcomer(prototype, prompt))
            self.pool.replace(slot, source)
            note_frame(self.shown, slot, prototype)

    def recall(self, prompt: Prompt) -> None:
        """Choose what attention sees of what is held: here all of it."""

    def pass_over(self, start: int, frames: int, prompt: Prompt | None) -> Pass:
        """The context of a call over `frames` frames from frame `start` on, the newest of the stream."""
        config, pool, stop = self.config, self.pool, start + frames
        device = pool.key.device
        oldest = stop - config.window_frames
        slots = [pool.slot_of(f) if f < config.sink_frames or f >= oldest else -1 for f in range(start, stop)]
        bank = self.visible_bank()
        candidates = self._candidates(start, stop, bank)
        return Pass(
            pools=self.layer_pools,
            prompt=prompt,
            grid=self.grid,
            start_frame=torch.full((1,), pool.place_of(start, stop), dtype=torch.int64, device=device),
            slots=torch.tensor(slots, dtype=torch.int32).to(device, non_blocking=True),
            first_slot=config.bank_frames - bank,
            end_slot=config.bank_frames + min(stop, config.sink_frames + config.window_frames),
            candidates=candidates,
            top_k=config.activated_blocks(candidates, pool.tokens_per_frame),
            unplaced=self.unplaced,
            rotation=self.rotation,
            block=config.activation_block,
            query_block=config.query_block,
            block_means=self.pool.block_means,
        )

    def end_chunk(self, start: int) -> None:
        """The clean pass over the chunk at frame `start` has been made."""

    def recache_span(self, start: int) -> tuple[int, int]:
        """(first frame, number of frames) that a prompt switch before frame `start` re-encodes.

        The frames of the window that stay in it. Those that the chunk overwrites keep, as prototypes for the bank, the
        keys and values of their own prompt.
        """
        config = self.config
        if not config.recache:
            return start, 0
        frames = max(0, min(config.window_frames - config.frames_per_chunk, start - config.sink_frames))
        return start - frames, frames

    def call_tokens(self) -> set[int]:
        """Tokens of every kind of call that a stream makes: over a chunk, and over what a prompt switch re-encodes."""
        chunk, config = self.config.frames_per_chunk, self.config
        starts = range(0, config.sink_frames + config.window_frames + 2 * chunk, chunk)
        frames = {chunk, *(self.recache_span(start)[1] for start in starts)} - {0}
        return {count * self.grid[0] * self.grid[1] for count in frames}

    # -- what is held ------------------------------------------------------------------------------------------------

    @property
    def held(self) -> Tensor:
        """[layers, B, n] int64: numbers of the frames held, -1 = empty place."""
        return self.shown

    def visible_bank(self) -> int:
        """Bank frames that attention sees."""
        return self.bank_used

    snapshot = snapshot_of

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Everything that a resumed stream needs: tensors and whole numbers apart."""
        tensors = {**self.pool.state_dict(), "shown": self.shown, "scene_starts": self.scene_starts}
        return tensors, {name: getattr(self, name) for name in self.counters}

    def load_state_dict(self, tensors: dict[str, Tensor], counters: dict[str, int]) -> None:
        self.pool.load_state_dict(tensors)
        copy_exactly(self.shown, tensors, "shown")
        starts = tensors.pop("scene_starts", None)
        if starts is None and self.config.scene_frame == "any":  # a state of MemFlow 0.2, which knew no scenes
            starts = self.scene_starts[:0]
        if starts is None or starts.ndim != 1 or starts.dtype != torch.int64:
            got = "nothing" if starts is None else f"{starts.dtype} {list(starts.shape)}"
            raise ValueError(f"scene_starts must be {torch.int64} [scenes], got {got}")
        self.scene_starts = starts.to(self.scene_starts.device)
        for name, value in self._checked(counters).items():
            setattr(self, name, value)
        self.pool.average_blocks()

    def _checked(self, counters: dict[str, int]) -> dict[str, int]:
        """`counters` that `state_dict` may have given; ValueError for others."""
        found = {name: counters.get(name) for name in self.counters}
        for name, value in found.items():
            if not isinstance(value, int) or not -1 <= value < 2**62:
                raise ValueError(f"{name} must be a whole number, got {value!r}")
        if not 0 <= found["bank_used"] <= self.config.bank_frames:
            raise ValueError(f"bank_used must be 0 to {self.config.bank_frames}, got {found['bank_used']}")
        return found

    def relevance(self, prompt: Prompt) -> Tensor:
        """[layers, B, n] float32: relevance of the held frames to the prompt, as the layers voted on it.

        Padding tokens do not count.
        """
        return relevance_of(self, prompt, self.held_means, *self._used_slots())

    def held_means(self) -> Tensor:
        """[layers, B, n, H, D]: mean keys of the frames held."""
        return self.pool.means(*self._used_slots())

    def _used_slots(self) -> tuple[int, int]:
        """First slot and number of the frames held."""
        return self.config.bank_frames - self.bank_used, self.bank_used

    def _held(self, prompt: Prompt) -> Held:
        """What is held, as the policy sees it."""
        frames = self.shown[..., self.config.bank_frames - self.bank_used :]
        return policy_view(self, frames, self.held_means, lambda: self.relevance(prompt), prompt)

    def _newcomer(self, prototype: int, prompt: Prompt) -> Held:
        """A frame of the window, as the policy sees it."""
        slot = self.pool.slot_of(prototype)
        means = lambda: self.pool.means(slot, 1)  # noqa: E731
        frames = torch.full_like(self.shown[..., :1], prototype)
        return policy_view(self, frames, means, lambda: relevance_of(self, prompt, means, slot, 1))

    def _candidates(self, start: int, stop: int, bank: int) -> int:
        # While the sink itself is being made its frames are the chunk's own: all of them are seen.
        return bank + self.config.sink_frames if start >= self.config.sink_frames else 0


def make_memory(config: MemoryConfig, **sizes) -> FrameMemory:
    """The memory of one stream.

    Args:
        config: what is held, shown and activated.
        sizes: layers, batch, heads, head_dim, grid, dtype, device and seeds, as `FrameMemory` takes them.

    Example:
        >>> from memflow.memory import MemoryConfig
        >>> sizes = {"layers": 2, "batch": 1, "heads": 2, "head_dim": 24, "grid": (2, 3)}
        >>> memory = make_memory(MemoryConfig(bank_frames=6), **sizes, dtype=torch.float32, device="cpu")
        >>> memory.pool.key.shape  # layers, batch, tokens of all slots, heads, head_dim
        torch.Size([2, 1, 108, 2, 24])
    """
    if config.published_mode is not None:
        kind = "published", "PublishedMemory"
    elif config.held_frames is not None or config.keeps_all:
        kind = "held", "HeldMemory"
    else:
        return FrameMemory(config, **sizes)
    # By name: they build on this module.
    return getattr(import_module(f"memflow.memory.{kind[0]}"), kind[1])(config, **sizes)

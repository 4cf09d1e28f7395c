"""`MemoryConfig`: what a stream's memory holds, shows and activates, and where attention sees it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from numbers import Integral, Real

from memflow.errors import MemFlowError
from memflow.memory.policies import POLICIES

RECALLS = ("relevance", "coverage", "originals")
SCENE_FRAMES = ("any", "first", "latest")
_MOST = 2**31 - 1  # of any count: what tensors and kernels can be told
PUBLISHED_MODES = ("interactive", "single")  # the published pipelines


@dataclass(frozen=True)
class MemoryConfig:
    """What is held, what is shown and what is activated. Every count is in latent frames.

    frames_per_chunk: frames denoised together.
    sink_frames: the first frames of the stream, kept for ever.
    window_frames: the newest frames, the current chunk included, the sink not.
    bank_frames: places for past frames that attention sees.
    held_frames: past frames held, of which the bank shows those that the coming prompt calls for; at least
        bank_frames. None: the bank is all that is held; or, with the policies that forget nothing, everything is.
    policy: which frame is given up when no more can be held: one of `memflow.memory.policies.POLICIES`.
    recall: what the bank shows of more frames than it has places: "relevance" = those that are most relevant to the
        coming prompt, each by itself; "coverage" = a set that covers the tokens of the prompt, so that each token finds
        a frame that answers it well; "originals" = such a set, in which of the frames that answer a token the oldest
        counts and no later one, which is a copy of it; it may be shown in several places, and others that are held in
        none (`memflow.memory.recall`).
    scene_frame: which held frames of a scene (the frames between two prompts) are preferred for the bank: "any", or
        the "first", which is no copy of a copy, or the "latest", for stories in which looks are meant to change.
    top_k: candidate frames (bank + sink) that each head attends to; None = all of them.
    activated: the same in other words: candidate keys that each head attends to, a whole number of keys or a share of
        all candidates (0.25, say).
    activation_block: tokens that are activated together, a divisor of a frame's tokens; None = whole frames. A head
        then attends to as many keys as top_k or activated says, in blocks of this size (a row of tokens, say).
    query_block: queries that choose together what they attend to; None = all queries of a head.
    layers: "each" = every layer holds and shows frames of its own; "mean" = those of one vote, the mean of what all
        layers but the first say (its keys know nothing of the text yet).
    aggregate: how a relevance is summed up, "mean" or "softmax" (see `memflow_kernels.prompt_relevance`).
    positions: where attention sees a frame: "absolute" = at its number, "relative" = by its distance to the newest
        frame, so that a stream may run for ever (see `memflow.memory.places`). A model is trained for one of them.
    record_interval: every how many chunks a prototype (first frame of the chunk) is recorded.
    recache: at a prompt switch encode the frames that stay in the window again, under the new prompt. A model is
        trained for one or the other; without, every frame keeps the keys of the prompt that it shows.
    published_mode: None, or the name of the published pipeline ("interactive", "single") whose behaviour is repeated
        exactly, its known defects included; see `MemoryConfig.published`.
    global_sink: published behaviour only: False empties sink and window at a prompt switch.
    """

    frames_per_chunk: int = 3
    sink_frames: int = 3
    window_frames: int = 9
    bank_frames: int = 3
    held_frames: int | None = None
    top_k: int | None = None
    policy: str = "prompt"
    recall: str = "relevance"
    scene_frame: str = "any"
    activated: int | float | None = None
    activation_block: int | None = None
    query_block: int | None = None
    layers: str = "each"
    aggregate: str = "mean"
    positions: str = "absolute"
    record_interval: int = 1
    recache: bool = True
    published_mode: str | None = None
    global_sink: bool = True

    def __post_init__(self):
        for name, least in (("frames_per_chunk", 1), ("sink_frames", 0), ("bank_frames", 0), ("record_interval", 1)):
            _require_count(name, getattr(self, name), least)
        for name in ("recache", "global_sink"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        _require_count("window_frames", self.window_frames, self.frames_per_chunk)
        _require_one_of("policy", self.policy, tuple(POLICIES))
        _require_one_of("layers", self.layers, ("each", "mean"))
        _require_one_of("aggregate", self.aggregate, ("mean", "softmax"))
        _require_one_of("positions", self.positions, ("absolute", "relative"))
        _require_one_of("recall", self.recall, RECALLS)
        _require_one_of("scene_frame", self.scene_frame, SCENE_FRAMES)
        self._check_held()
        self._check_recall()
        self._check_activation()
        if self.published_mode is not None:
            self._check_published()
        elif not self.global_sink:
            raise ValueError("global_sink must be True without published_mode: only that code empties its sink")
        for field in fields(self):  # numpy's whole numbers too, which no saved state could hold
            value = getattr(self, field.name)
            if isinstance(value, Integral) and not isinstance(value, bool):
                object.__setattr__(self, field.name, int(value))

    def _check_held(self) -> None:
        if self.held_frames is not None and (self.policy == "none" or self.bank_frames == 0):
            why = (
                "policy='none', which holds nothing" if self.policy == "none" else "bank_frames=0, which shows nothing"
            )
            raise ValueError(f"held_frames must be None with {why}, got {self.held_frames!r}")
        if self.policy == "none":
            object.__setattr__(self, "bank_frames", 0)
        if not self.keeps_all:
            if self.held_frames is not None:
                _require_count("held_frames", self.held_frames, max(1, self.bank_frames))
            return
        if self.bank_frames == 0:
            raise ValueError(
                f"bank_frames must be a whole number of at least 1, got 0: policy={self.policy!r} holds past frames "
                "for the bank to show"
            )
        if self.held_frames is not None:
            raise ValueError(f"held_frames must be None with policy={self.policy!r}, which forgets nothing")
        if self.aggregate != "mean":
            raise ValueError(
                f"aggregate must be 'mean' with policy={self.policy!r}, got {self.aggregate!r}: "
                "it compares all past frames by their means, their keys are in host memory"
            )

    def _check_recall(self) -> None:
        """What is shown is a question only where more is held than shown, and where the prompt decides."""
        for name, default in (("recall", "relevance"), ("scene_frame", "any")):
            value = getattr(self, name)
            if value == default:
                continue
            if self.held_frames is None and not self.keeps_all:
                raise ValueError(
                    f"{name} must be {default!r} where held_frames is None, got {value!r}: the bank shows all that "
                    f"policy={self.policy!r} holds"
                )
            if not POLICIES[self.policy].by_relevance():
                raise ValueError(
                    f"{name} must be {default!r} with policy={self.policy!r}, got {value!r}: this policy shows what it "
                    "says, whatever the prompt"
                )
        if self.recall != "relevance" and self.aggregate != "mean":
            raise ValueError(f"aggregate must be 'mean' with recall={self.recall!r}, got {self.aggregate!r}")
        if self.recall == "originals" and self.scene_frame != "any":
            raise ValueError(
                f"scene_frame must be 'any' with recall='originals', which shows the first of all scenes, "
                f"got {self.scene_frame!r}"
            )

    def _check_activation(self) -> None:
        if self.top_k is not None:
            _require_count("top_k", self.top_k, 1)
        share = self.activated
        if share is not None:
            if self.top_k is not None:
                raise ValueError(f"activated must be None with top_k={self.top_k}, which says the same, got {share!r}")
            if isinstance(share, Real) and not isinstance(share, Integral):
                if not 0 < share <= 1:
                    raise ValueError(f"activated must be above 0 and at most 1.0 where it is a share, got {share!r}")
                object.__setattr__(self, "activated", float(share))
            else:
                _require_count("activated", share, 1)
        for name in ("activation_block", "query_block"):
            value = getattr(self, name)
            if value is not None:
                _require_count(name, value, 1)
                if self.top_k is None and share is None:
                    raise ValueError(f"{name}={value} needs top_k or activated: how much a head attends to")

    def _check_published(self) -> None:
        _require_one_of("published_mode", self.published_mode, PUBLISHED_MODES)
        _require_count("bank_frames", self.bank_frames, 1)
        needed = {"policy": "prompt", "layers": "each", "aggregate": "mean", "positions": "absolute", "recache": True}
        for name, value in needed.items():
            _require_one_of(name, getattr(self, name), (value,))
        for name in ("activated", "activation_block", "query_block", "held_frames"):
            if getattr(self, name) is not None:
                mode = self.published_mode
                raise ValueError(f"{name} must be None with published_mode={mode!r}, got {getattr(self, name)!r}")

    @property
    def keeps_all(self) -> bool:
        """Whether the policy forgets nothing, so that all past frames are held, in host memory."""
        return POLICIES[self.policy].keeps_all

    def activated_blocks(self, candidates: int, tokens: int) -> int | None:
        """Blocks of so many candidate frames, of so many tokens each, that a head attends to; None = all."""
        block = self.activation_block or tokens
        if self.activated is None:
            return self.top_k and self.top_k * (tokens // block)
        keys = self.activated * candidates * tokens if isinstance(self.activated, float) else self.activated
        return max(1, round(keys / block))

    def leaving_prototype(self, start: int) -> int | None:
        """The recorded frame that the chunk at frame `start` will overwrite in the window; None: there is none, or no
        bank to take it."""
        chunk, leaving = self.frames_per_chunk, start - self.window_frames
        prototype = -(-leaving // chunk) * chunk
        recorded = prototype % (chunk * self.record_interval) == 0
        inside = max(leaving, self.sink_frames) <= prototype < leaving + chunk
        return prototype if self.bank_frames and recorded and inside else None

    def changed(self, **changes) -> MemoryConfig:
        """These settings with others in place of some.

        recall and scene_frame, unless they are given, are "relevance" and "any" where the change leaves them without
        effect: nothing is held beyond the bank, or the policy shows what it says. Of top_k and activated, which say the
        same, the one that is given counts; so it is with recall="originals" and a scene_frame other than "any".

        Args:
            changes: fields of `MemoryConfig`.

        Raises:
            ValueError: a value that cannot be.
        """
        policy, held = changes.get("policy", self.policy), changes.get("held_frames", self.held_frames)
        kind = POLICIES.get(policy)
        fallen = {}
        if kind is not None and ((held is None and not kind.keeps_all) or not kind.by_relevance()):
            fallen = {"recall": type(self).recall, "scene_frame": type(self).scene_frame}
        elif "recall" not in changes and self.recall == "originals" and changes.get("scene_frame", "any") != "any":
            fallen = {"recall": "coverage"}
        elif "scene_frame" not in changes and changes.get("recall") == "originals":
            fallen = {"scene_frame": "any"}
        for name, other in (("top_k", "activated"), ("activated", "top_k")):
            if changes.get(name) is not None and other not in changes:
                fallen[other] = None
        return replace(self, **fallen | changes)

    @classmethod
    def published(
        cls,
        mode: str = "interactive",
        *,
        local_frames: int = 12,
        sink_frames: int = 3,
        record_interval: int = 3,
        **rest,
    ) -> MemoryConfig:
        """The memory as the published code has it, for its checkpoints and its recorded numbers.

        Args:
            mode: the published pipeline, "interactive" (prompts that switch) or "single".
            local_frames: frames of sink and window together, counted as the published settings do.
            sink_frames: the first frames of the stream, kept for ever.
            record_interval: every how many chunks a prototype is recorded.
            rest: other fields of `MemoryConfig`.

        Raises:
            ValueError: a value that cannot be.
        """
        _require_one_of("mode", mode, PUBLISHED_MODES)
        chunk = rest.get("frames_per_chunk", cls.frames_per_chunk)
        _require_count("sink_frames", sink_frames, 0)
        _require_count("local_frames (the sink included)", local_frames, sink_frames + chunk)
        return cls(
            published_mode=mode,
            sink_frames=sink_frames,
            window_frames=local_frames - sink_frames,
            record_interval=record_interval,
            **rest,
        )

    def to_dict(self) -> dict:
        """All settings by name, as plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, settings: dict) -> MemoryConfig:
        """The config that `to_dict` wrote.

        Args:
            settings: values by name; what is missing has its default.

        Raises:
            MemFlowError: a name that is not known here, or a value that cannot be.
        """
        unknown = sorted(set(settings) - {field.name for field in fields(cls)})
        if unknown == ["published"]:
            raise MemFlowError("memory settings: 'published' is called 'published_mode' now")
        if unknown:
            raise MemFlowError(f"memory settings: unknown: {', '.join(map(str, unknown))}")
        try:
            return cls(**settings)
        except ValueError as error:
            raise MemFlowError(f"memory settings: {error}") from None


def _require_count(name: str, value, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    if value > _MOST:
        raise ValueError(f"{name} must be at most {_MOST}, got {value}")


def _require_one_of(name: str, value, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")

"""Does the memory bring back who and what was away? Stories told by the model itself, under one policy at a time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from examples.storybook.measure import landmark_colour, measure, same_colour
from examples.storybook.stories import CHUNK, LENGTHS, Trial, recall_trial
from examples.storybook.world import ACTIONS, Frame, act, entrance
from memflow.memory import MemoryConfig

_Z = 1.959964  # 95 %
BATCH = 34  # stories told together


@dataclass(frozen=True)
class Setting:
    """A memory to be tested: changes to the model's own `MemoryConfig`."""

    label: str
    changes: dict = field(default_factory=dict)

    def config(self, trained: MemoryConfig) -> MemoryConfig:
        plain = {"held_frames": None, "top_k": None, "recall": "relevance", "scene_frame": "any"}
        return replace(trained, **plain | self.changes)


SETTINGS = [
    Setting("none", {"policy": "none", "sink_frames": 0}),
    Setting("sink", {"policy": "none"}),
    Setting("fifo", {"policy": "fifo"}),
    Setting("random", {"policy": "random"}),
    Setting("published", {"policy": "prompt", "bank_frames": 3}),
    Setting("published, bank of 6", {"policy": "prompt"}),
    Setting("diverse", {"policy": "diverse"}),
    Setting("diverse, top 3", {"policy": "diverse", "top_k": 3}),
    Setting("diverse, 12 held", {"policy": "diverse", "held_frames": 12}),
    Setting("diverse, 24 held", {"policy": "diverse", "held_frames": 24}),
    Setting("original", {"policy": "original"}),
    Setting("original, 12 held", {"policy": "original", "held_frames": 12}),
    Setting("original, 24 held", {"policy": "original", "held_frames": 24}),
    Setting("original, 24 held, top 3", {"policy": "original", "held_frames": 24, "top_k": 3}),
    Setting("archive", {"policy": "archive"}),
    Setting("archive, top 3", {"policy": "archive", "top_k": 3}),
    Setting("oracle", {"policy": "oracle"}),
    Setting("oracle, top 3", {"policy": "oracle", "top_k": 3}),
]
MEASURES = {
    "colour": "a returning character's colour",
    "shape": "a returning character's shape",
    "landmark": "the landmark's colour in a place seen again, as the model itself drew it first",
    "hit character": "attention sees a frame of the returning character",
    "hit place": "attention sees a frame of the place",
    "scene": "the place that the prompt names",
    "action": "the action that the prompt names",
    "look": "colour and shape where the prompt states them",
}
LAST = ("last colour", "last landmark")  # of returns of several chunks, in the last one


def settings_named(names: list[str] | None) -> list[Setting]:
    """The settings with these labels; all where None. ValueError names what is unknown."""
    known = {setting.label: setting for setting in SETTINGS}
    unknown = [name for name in names or [] if name not in known]
    if unknown:
        raise ValueError(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")
    return [known[name] for name in names or known]


class Share(NamedTuple):
    """`hits` of `count`, as a share with its 95 % interval (Wilson's score interval, 1927)."""

    hits: int
    count: int

    @property
    def value(self) -> float:
        return self.hits / self.count if self.count else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        if not self.count:
            return math.nan, math.nan
        n, p = self.count, self.value
        middle = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
        half = _Z / (1 + _Z**2 / n) * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n * n))
        return max(0.0, min(p, middle - half)), min(1.0, max(p, middle + half))  # rounding may leave p = 0 or 1 out

    def __add__(self, other: tuple[int, int]) -> Share:
        return Share(self.hits + other[0], self.count + other[1])

    def to_dict(self) -> dict:
        low, high = self.interval
        return {"value": self.value, "low": low, "high": high, "hits": self.hits, "count": self.count}


def chance_of_a_hit(past: int, useful: int, shown: int) -> float:
    """Probability that `shown` of `past` frames, drawn at random, hold at least one of the `useful` ones."""
    if not past or not useful:
        return 0.0
    shown = min(shown, past)
    return 1.0 - math.comb(past - useful, shown) / math.comb(past, shown)


def total(shares: list[Share]) -> Share:
    whole = Share(0, 0)
    for share in shares:
        whole += share
    return whole


def trials(length: str, count: int, seed: int) -> list[Trial]:
    """`count` stories of a length of `examples.storybook.stories.LENGTHS`; the same for equal seeds."""
    random = np.random.default_rng([seed, LENGTHS[length]])
    return [recall_trial(random, LENGTHS[length]) for _ in range(count)]


def evaluate(pipeline, setting: Setting, length: str, stories: int, seed: int) -> dict:
    """Tell `stories` stories under `setting` and measure them.

    Returns {"shares": a `Share` for each of MEASURES, "seconds": per story without decoding, "chance": of a hit at
    random for "hit character" and "hit place"}.
    """
    shares = dict.fromkeys(MEASURES, Share(0, 0))
    seconds, chances = 0.0, []
    all_trials = trials(length, stories, seed)
    for first in range(0, stories, BATCH):
        told = Telling(pipeline, setting, all_trials[first : first + BATCH], seed * 1_000_000 + first)
        seconds += told.seconds
        chances += told.chances
        for name, values in told.outcomes().items():
            shares[name] += (sum(values), len(values))
    return {"shares": shares, "seconds": seconds / stories, "chance": float(np.mean(chances)) if chances else 0.0}


class Telling:
    """One batch of trials, told. prepare: what is done to the stream's memory before anything is made.

    seen: what the frames of the scenes that count show in their first chunk, fields [stories, CHUNK]; landmarks: the
    mean colours of their landmarks [stories, 3]; last: both in the last chunk of long returns.
    """

    def __init__(self, pipeline, setting: Setting, part: list[Trial], seed: int, prepare: Callable | None = None):
        self.trials, self.chunks = part, part[0].chunks
        prompts = [list(texts) for texts in zip(*(trial.script.prompts() for trial in part), strict=True)]
        config = setting.config(pipeline.memory_config)
        stream = pipeline.stream(
            prompts,
            seconds_per_prompt=self.chunks * CHUNK / pipeline.fps,
            seed=[seed + row for row in range(len(part))],
            memory=config,
        )
        stream.decoder = Undecoded()
        if prepare is not None:
            prepare(stream.memory)
        self.seen: dict[int, Frame] = {}
        self.landmarks: dict[int, Tensor] = {}
        self.last: dict[int, tuple[Frame, Tensor]] = {}
        self.hits: dict[str, list[bool]] = {"hit character": [], "hit place": []}
        self.chances: list[float] = []
        self.seconds = 0.0
        first = part[0]
        for scene in range(len(prompts)):
            if config.policy == "oracle":
                stream.memory.policy.wanted = [trial.useful_frames(scene) for trial in part]
            begin = time.perf_counter()
            chunk = next(stream)  # of a scene the first chunk counts
            self.seconds += time.perf_counter() - begin
            if self.chunks > 1 or scene in first.meetings or scene in first.returns:
                self.seen[scene], self.landmarks[scene] = measure_latents(pipeline.vae, chunk.latents)
            if scene in first.returns:
                self._note_hits(stream.snapshot(), scene)
            for _ in range(self.chunks - 1):
                chunk = next(stream)
            if self.chunks > 1 and scene in first.returns:
                self.last[scene] = measure_latents(pipeline.vae, chunk.latents)

    def _note_hits(self, snapshot, scene: int) -> None:
        """Whether sink, window and what is recalled, in the last layer, show the character, and the place."""
        shown = snapshot.recalled[-1]  # [B, bank]
        length = CHUNK * self.chunks
        always = [frame // length for frame in (*snapshot.sink, *snapshot.window)]
        past = scene * self.chunks - 3  # prototypes that have left the window, the sink not counted
        for trial, frames in zip(self.trials, shown, strict=True):
            scenes = trial.script.scenes
            held = {int(frame) // length for frame in frames if frame >= 0} | {i for i in always if i < scene}
            for name, key in (("hit character", "name"), ("hit place", "place")):
                self.hits[name].append(any(getattr(scenes[i], key) == getattr(scenes[scene], key) for i in held))
            self.chances.append(chance_of_a_hit(past, 1, shown.shape[1]))

    def outcomes(self) -> dict[str, list[bool]]:
        """What was right and what was not, by the names of MEASURES and, of long scenes, of LAST."""
        names = (*MEASURES, *LAST) if self.last else MEASURES
        found: dict[str, list[bool]] = {name: [] for name in names} | self.hits
        for row, trial in enumerate(self.trials):
            for scene in (*trial.meetings, *trial.returns):
                told = trial.script.scenes[scene]
                look = trial.script.looks[told.name]
                shown = Frame(*(values[row] for values in self.seen[scene]))
                hue, shape, place = (most(x) for x in (shown.hue, shown.shape, shown.place))
                found["scene"].append(place == told.place)
                found["action"].append(_acted(shown) == told.action)
                if scene in trial.meetings:
                    found["look"].append((hue, shape) == look)
                    continue
                _, place_met = trial.met_at(scene)
                found["colour"].append(hue == look.hue)
                found["shape"].append(shape == look.shape)
                # Nobody says the landmark's colour: what the model itself drew there first is what it must repeat.
                before, now = self.landmarks[place_met][row], self.landmarks[scene][row]
                found["landmark"].append(bool(same_colour(before, now)))
                if self.last:
                    frame, now = self.last[scene]
                    found["last colour"].append(most(frame.hue[row]) == look.hue)
                    found["last landmark"].append(bool(same_colour(before, now[row])))
        return found


class Undecoded:
    """Stands in for a stream's decoder: only few of the chunks are looked at."""

    def decode(self, latents: Tensor) -> Tensor:
        return latents.new_empty(latents.shape[0], 0, 0, 0, 3)

    def state_dict(self) -> dict[str, Tensor]:
        return {}


@torch.no_grad()
def measure_latents(codec, latents: Tensor) -> tuple[Frame, Tensor]:
    """What clean latents [B, C, F, h, w] show: fields [B, F]; and the mean colour of the landmark [B, 3]."""
    stories = latents.shape[0]
    pictures = codec.decode_frames(latents.transpose(1, 2).flatten(0, 1)).clamp(0, 1).float().cpu()
    frame = measure(pictures)
    landmark = landmark_colour(pictures, frame.place).unflatten(0, (stories, -1)).mean(1)
    return Frame(*(values.unflatten(0, (stories, -1)) for values in frame)), landmark


def most(values: Tensor) -> int:
    """The value that most frames of a scene have; of equals the smallest."""
    return int(values.bincount().argmax())


def _acted(shown: Frame) -> int:
    """The action whose frames, from its entrance on, are most like those shown."""
    states = list(zip(shown.mood.tolist(), shown.step.tolist(), strict=True))
    likeness = []
    for name in ACTIONS:
        expected, _ = act(name, CHUNK, entrance(name))
        likeness.append(sum((mood == m) + (step == s) for (mood, step), (m, s) in zip(states, expected, strict=True)))
    return int(np.argmax(likeness))

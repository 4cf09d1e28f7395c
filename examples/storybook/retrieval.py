"""Retrieval alone: does the bank show who and what a prompt calls for, in stories as drawn, with nothing generated?

The model reads the true frames once (`Recording`); then the memory is told the same story again and again, under every
rule, by a stand-in model that writes the mean keys that were read. Relevance, likeness and coverage know nothing else
of a frame, so that this is the memory of a stream, and quick.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from examples.storybook.drawing import PLACES
from examples.storybook.model import encode_frames
from examples.storybook.results import Results
from examples.storybook.rules import BETTER, COVERED, RULES, TODAY, Rule
from examples.storybook.stories import CHUNK, Scene, Script, random_cast, wandering
from examples.storybook.world import ACTIONS, HUES, NAMES, SHAPES, prompt
from memflow.memory import MemoryConfig, Prompt
from memflow.memory.places import Rotation
from memflow.models.wan.adapter import WanModel
from memflow.models.wan.text import encode_prompts
from memflow.stream.chunks import ChunkDriver

MEASURES = ("character", "place", "both")
LONG_TEXT = 128  # tokens of the prompts that are far longer than any in training
LENGTHS = (27, 8, 5, 2)  # chunks of a scene
_UNKNOWN = "softly glowing evening light everywhere gently"
_NEUTRAL = [*HUES, *SHAPES, "a", "an", "the", "on", "in", ",", "jumps", "waits", "walks", "left", "right"]


@dataclass
class Recording:
    """Stories that were read. scripts: of the stories. asked: the scenes that count, of equal numbers in all stories.
    means: [layers, B, chunks, H, D], mean keys of the first frame of each chunk, at place 0. prompts: by kind of text
    and number of the scene. wanted: by number of the scene, for each story the names and the place to be shown."""

    scripts: list[Script]
    asked: list[int]
    means: Tensor
    prompts: dict[tuple[str, int], Prompt]
    wanted: dict[int, list[tuple[set[int], int]]]
    starts: list[int] = field(default_factory=list)  # first chunk of each scene


def read(pipeline, scripts: list[Script], asked: dict[int, dict[str, list[str]]], wanted: dict) -> Recording:
    """Read stories whose scenes have the same lengths. asked: texts by scene and kind, one per story."""
    driver = ChunkDriver(WanModel(pipeline.transformer), pipeline.memory_config)
    texts = [list(row) for row in zip(*(script.prompts() for script in scripts), strict=True)]
    numbers = torch.from_numpy(np.stack([script.frames() for script in scripts]))
    lengths = [scene.chunks for scene in scripts[0].scenes]
    starts = np.cumsum([0, *lengths]).tolist()
    means, prompts = [], {}
    with torch.no_grad():
        for scene, begin in enumerate(starts[:-1]):
            embeds, mask = _encode(pipeline, texts[scene], pipeline.config.text_length)
            driver.prompt(embeds, mask)
            prompts["plain", scene] = driver.model.encode_prompt(embeds, mask)
            for kind, said in asked.get(scene, {}).items():
                long = kind.startswith("100 tokens")
                encoded = _encode(pipeline, said, LONG_TEXT if long else pipeline.config.text_length)
                prompts[kind, scene] = driver.model.encode_prompt(*encoded)
            for chunk in range(begin, starts[scene + 1]):
                frames = numbers[:, chunk * CHUNK : (chunk + 1) * CHUNK]
                driver.keep(encode_frames(pipeline.vae, frames).transpose(1, 2))
                driver.settle()
                pool = driver.memory.pool
                means.append(pool.means(pool.slot_of(chunk * CHUNK), 1).clone())
    return Recording(scripts, sorted(asked), torch.cat(means, 2), prompts, wanted, starts)


def shown(recording: Recording, config: MemoryConfig, rule: Rule, kind: str) -> dict[str, list[bool]]:
    """Whether attention sees what the prompts call for, scene by scene, in each story by itself."""
    model = Replay(recording)
    driver = ChunkDriver(model, config)
    driver.open(len(recording.scripts), 1, 1)
    rule.apply(driver.memory)
    # What is held depends on no prompt, and nothing attends: the bank need not be filled but where it is asked for.
    recall, driver.memory.recall = driver.memory.recall, lambda prompt: None
    driver.memory.pool.place = lambda places: None
    found: dict[str, list[bool]] = {name: [] for name in MEASURES}
    for scene, begin in enumerate(recording.starts[:-1]):
        asked = scene in recording.asked
        model.prompt = recording.prompts.get((kind if asked else "plain", scene), recording.prompts["plain", scene])
        driver.prompt(torch.ones(len(recording.scripts), 1, 1))
        for chunk in range(begin, recording.starts[scene + 1]):
            latents = torch.full((len(recording.scripts), 1, CHUNK, 1, 1), float(chunk))
            driver.keep(latents)
            if asked and chunk == begin:
                recall(model.prompt)
                _note(found, recording, scene, driver.memory)
            driver.settle()
    return found


def _note(found: dict[str, list[bool]], recording: Recording, scene: int, memory) -> None:
    of_chunk = recording.scripts[0].scene_of_chunks()
    sink = range(memory.config.sink_frames)
    for row, (script, (names, place)) in enumerate(zip(recording.scripts, recording.wanted[scene], strict=True)):
        frames = [frame for frame in memory.shown[-1, row].tolist() if frame >= 0]
        scenes = [script.scenes[of_chunk[frame // CHUNK]] for frame in (*frames, *sink)]
        character = names <= {told.name for told in scenes}
        right = place in {told.place for told in scenes}
        for name, value in zip(MEASURES, (character, right, character and right), strict=True):
            found[name].append(value)


class Replay:
    """A `memflow.models.base.VideoModel` that writes the keys of a recording: one token per frame, its mean key."""

    channels, text_dim, dtype, device, rotation = 1, 1, torch.float32, torch.device("cpu"), Rotation()

    def __init__(self, recording: Recording):
        self.means = recording.means
        self.layers, _, _, self.heads, self.head_dim = self.means.shape
        self.prompt: Prompt | None = None

    def grid(self, rows, columns):
        return rows, columns

    def encode_prompt(self, embeds, mask):
        return self.prompt

    def text_version(self):
        return None

    def write_clean(self, latents, step):
        mean = self.means[:, :, int(latents[0, 0, 0, 0, 0])]  # [layers, B, H, D]
        for slot in step.slots.tolist():
            for layer, pool in enumerate(step.pools):
                # Of the first channels, which turn with time, the memory asks at place 0 alone.
                pool.key[:, slot], pool.frame_mean[:, slot] = mean[layer], mean[layer]
                beside = step.unplaced[layer]
                beside.key[:, slot] = mean[layer][..., : beside.key.shape[-1]]
                beside.frame_mean[:, slot] = mean[layer]


def _encode(pipeline, texts: list[str], length: int) -> tuple[Tensor, Tensor]:
    return encode_prompts(pipeline.tokenizer, pipeline.text_encoder, texts, length)


# -- the stories -----------------------------------------------------------------------------------------------------


def record_returns(
    pipeline, random: np.random.Generator, stories: int, scenes: int, returned: int, chunks: int
) -> Recording:
    """Wandering stories, and texts of every kind for their returns."""
    trials = [wandering(random, scenes, returned, chunks) for _ in range(stories)]
    asked: dict[int, dict[str, list[str]]] = {}
    wanted = {}
    for scene in trials[0].returns:
        told = [trial.script.scenes[scene] for trial in trials]
        plain = [trial.script.prompts()[scene] for trial in trials]
        looks = [trial.script.looks[one.name] for trial, one in zip(trials, told, strict=True)]
        asked[scene] = {
            "looks": [_said(one, look) for one, look in zip(told, looks, strict=True)],
            "unknown words": [f"{text} {_UNKNOWN}" for text in plain],
            "100 tokens, unknown": [f"{'soft light ' * 23}{text} {'slow clouds ' * 23}" for text in plain],
            "100 tokens, known": [f"{_filler(random)} . {text} {_filler(random)}" for text in plain],
        }
        wanted[scene] = [({one.name}, one.place) for one in told]
    return read(pipeline, [trial.script for trial in trials], asked, wanted)


def record_pairs(pipeline, random: np.random.Generator, stories: int, chunks: int) -> Recording:
    """All six characters, each in a place of its own for `chunks` chunks; then they are named in pairs."""
    scripts, pairs = [], []
    for _ in range(stories):
        looks, landmarks = random_cast(random)
        names, places = random.permutation(len(NAMES)).tolist(), random.permutation(len(PLACES)).tolist()
        scenes = [Scene(n, p, int(random.integers(len(ACTIONS))), chunks) for n, p in zip(names, places, strict=True)]
        together = random.permutation(len(NAMES)).reshape(-1, 2).tolist()
        where = random.permutation(len(PLACES))[: len(together)].tolist()
        scenes += [Scene(a, p, 3, 1) for (a, _), p in zip(together, where, strict=True)]
        scripts.append(Script(scenes, looks, landmarks))
        pairs.append(together)
    asked, wanted = {}, {}
    for index in range(len(pairs[0])):
        scene = len(NAMES) + index
        told = [script.scenes[scene] for script in scripts]
        both = [row[index] for row in pairs]
        named = [(NAMES[a], f"{NAMES[a]} and {NAMES[b]}") for a, b in both]
        asked[scene] = {"pairs": [_said(one).replace(*names, 1) for one, names in zip(told, named, strict=True)]}
        wanted[scene] = [(set(row), one.place) for row, one in zip(both, told, strict=True)]
    return read(pipeline, scripts, asked, wanted)


def _said(scene: Scene, look=None) -> str:
    return prompt(NAMES[scene.name], PLACES[scene.place], ACTIONS[scene.action], look)


def _filler(random: np.random.Generator) -> str:
    """45 words of the world that name nobody and no place."""
    return " ".join(random.choice(_NEUTRAL, size=45))


# -- what is measured ------------------------------------------------------------------------------------------------


def cases(length: int) -> Iterator[tuple[str, int, str, tuple[str, ...]]]:
    """(held, bank, kind of prompt, rules) for scenes of `length` chunks."""
    every = tuple(RULES)
    yield "24", 6, "plain", every
    if length != 27:
        return
    for bank in (3, 2):
        yield "24", bank, "plain", every
    for bank in (6, 3):
        yield "archive", bank, "plain", every
        for kind in ("looks", "unknown words"):
            yield "24", bank, kind, every
        for kind in ("100 tokens, unknown", "100 tokens, known"):
            yield "24", bank, kind, (TODAY, "one per scene, then top", "coverage", COVERED, BETTER)


def run(pipeline, results: Results, *, stories: int, seeds: list[int], labels: list[str]) -> None:
    """All cases of the rules `labels`, `stories` stories for each kind and seed."""
    measure = partial(_run_cases, pipeline, results, labels)
    many = [(held, 6, "plain", tuple(RULES)) for held in ("archive", "24")]
    pairs = [("24", bank, "pairs", tuple(RULES)) for bank in (6, 3)]
    for seed in seeds:
        for length in LENGTHS:
            record = partial(record_returns, pipeline, np.random.default_rng([seed, length]), stories, 12, 4, length)
            measure(f"12 scenes of {length}", seed, cases(length), record)
        record = partial(record_returns, pipeline, np.random.default_rng([seed, 28, 2]), stories, 28, 8, 2)
        measure("28 scenes of 2", seed, many, record)
        record = partial(record_pairs, pipeline, np.random.default_rng([seed, 6, 2]), stories, 27)
        measure("9 scenes, six of 27", seed, pairs, record)


def _run_cases(pipeline, results: Results, labels: list[str], stories: str, seed: int, todo, record) -> None:
    """What of `todo` is not there yet, over the stories that `record` reads, once."""
    recording = None
    for held, bank, kind, rules in todo:
        for label in (label for label in rules if label in labels):
            about = {"part": "retrieval", "stories": stories, "seed": seed, "held": held, "bank": bank, "prompts": kind}
            about["rule"] = label
            if about in results:
                continue
            recording = recording or record()
            begin, rule = time.perf_counter(), RULES[label]
            changes = {"policy": "archive", "held_frames": None} if held == "archive" else {"held_frames": int(held)}
            config = rule.config(pipeline.memory_config, bank_frames=bank, **changes)
            results.add(about, shown(recording, config, rule, kind), time.perf_counter() - begin)

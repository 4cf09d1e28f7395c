"""Stories that the model tells itself: long scenes under rules of recall, kinds of activation, a story without end."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import numpy as np

from examples.storybook.drawing import PLACES
from examples.storybook.recall import LAST, Setting, Telling, Undecoded, measure_latents, most
from examples.storybook.results import Results
from examples.storybook.rules import BETTER, COVERED, ONCE, RULES, TODAY
from examples.storybook.stories import CHUNK, LENGTHS, Scene, Script, random_cast, recall_trial, wandering
from examples.storybook.world import ACTIONS, NAMES

COMPARED = ("colour", "shape", "landmark", "scene", "action")
ACTIVATED = {
    "all": {},
    "1/9, frames": {"activated": 1 / 9},
    "1/9, rows": {"activated": 1 / 9, "activation_block": 4},
    "1/9, rows, each row of queries": {"activated": 1 / 9, "activation_block": 4, "query_block": 4},
    "1/9, tokens, each row of queries": {"activated": 1 / 9, "activation_block": 1, "query_block": 4},
    "2/9, frames": {"activated": 2 / 9},
    "2/9, rows": {"activated": 2 / 9, "activation_block": 4},
}
SCENE_OF_ENDLESS = 5  # chunks


def tell_returns(
    pipeline, results: Results, *, stories: int, seeds: list[int], held: str, rules: list[str], chunks: int = 27
) -> None:
    """Stories of nine scenes of `chunks` chunks; of each seed `stories`, in one batch."""
    for seed in seeds:
        for label in rules:
            about = {"part": "generated", "stories": f"9 scenes of {chunks}", "count": stories, "seed": seed}
            about |= {"held": held, "rule": label}
            if about in results:
                continue
            random = np.random.default_rng([seed, chunks, 9])
            trials = [wandering(random, 9, 4, chunks) for _ in range(stories)]
            changes = {"policy": "archive"} if held == "archive" else {"held_frames": int(held)}
            rule = RULES[label]
            setting = Setting(label, {**changes, "recall": rule.recall, "scene_frame": rule.scene_frame})
            _tell(pipeline, results, about, setting, trials, seed, rule.apply)


def tell_activated(pipeline, results: Results, *, stories: int, seeds: list[int], kinds: list[str]) -> None:
    """Stories of short scenes, under every kind of activation; the bank is full long before they end."""
    for seed in seeds:
        for length, between in LENGTHS.items():
            for label in kinds:
                about = {"part": "activation", "stories": length, "count": stories, "seed": seed}
                about |= {"rule": BETTER, "activated": label}
                if about in results:
                    continue
                random = np.random.default_rng([seed, between, 1])
                trials = [recall_trial(random, between) for _ in range(stories)]
                shown = {"held_frames": 24, "recall": RULES[BETTER].recall}
                _tell(pipeline, results, about, Setting(label, shown | ACTIVATED[label]), trials, seed)


def _tell(pipeline, results: Results, about: dict, setting: Setting, trials: list, seed: int, prepare=None) -> None:
    begin = time.perf_counter()
    told = Telling(pipeline, setting, trials, seed * 1_000_000, prepare).outcomes()
    both = [a and b for a, b in zip(told["hit character"], told["hit place"], strict=True)]
    outcomes = {name: told[name] for name in (*COMPARED, *LAST) if name in told}
    # Hits were noted scene by scene; all else story by story.
    per_story = np.array(both).reshape(-1, len(trials)).T.flatten().tolist()
    results.add(about, {"both shown": per_story, **outcomes}, time.perf_counter() - begin)


def endless_script(scenes: int = 1000) -> Script:
    """A story in which all are introduced in the first scenes and come back about a hundred times each."""
    random = np.random.default_rng(7)
    looks, landmarks = random_cast(random)
    cast = [Scene(name, name, 0, 1) for name in range(len(NAMES))]
    draw = [random.integers(size, size=1000 - len(cast)) for size in (len(NAMES), len(PLACES), len(ACTIONS))]
    script = Script(cast + [Scene(*map(int, scene), 1) for scene in zip(*draw, strict=True)], looks, landmarks)
    return Script(script.scenes[:scenes], looks, landmarks)


def tell_endless(
    pipeline, results: Results, *, rule: str = BETTER, scenes: int = 1000, state: Path | None = None
) -> None:
    """A story of `scenes` scenes of five chunks: whether place and colour are right at the end of each scene, and the
    colour in its first chunk, which the memory alone tells. A line per hundred scenes; `state` keeps the stream in
    between."""
    script, chosen = endless_script(scenes), RULES[rule]
    memory = chosen.config(pipeline.memory_config)
    abouts = [
        {"part": "endless", "scenes": f"{first} to {first + 100}", "seed": 1, "rule": rule}
        for first in range(0, scenes, 100)
    ]
    done = sum(about in results for about in abouts)
    if done == len(abouts):
        return
    if state is not None and done and state.exists():
        stream = pipeline.resume(state)
    else:
        seconds = SCENE_OF_ENDLESS * CHUNK / pipeline.fps
        stream = pipeline.stream(script.prompts(), seconds_per_prompt=seconds, seed=1, memory=memory)
    stream.decoder = Undecoded()
    chosen.apply(stream.memory)
    for about in abouts:
        first = int(about["scenes"].split()[0])
        last = min(first + 100, scenes)
        if stream.position >= last * SCENE_OF_ENDLESS:
            continue
        begin, found = time.perf_counter(), {"place": [], "colour": [], "first colour": []}
        for chunk in stream:
            scene, place = divmod(chunk.index, SCENE_OF_ENDLESS)
            if place in (0, SCENE_OF_ENDLESS - 1):
                scene = script.scenes[scene]
                shown, _ = measure_latents(pipeline.vae, chunk.latents)
                colour = most(shown.hue[0]) == script.looks[scene.name].hue
                if place == 0:
                    found["first colour"].append(colour)
                else:
                    found["place"].append(most(shown.place[0]) == scene.place)
                    found["colour"].append(colour)
            if stream.position == last * SCENE_OF_ENDLESS:
                break
        if state is not None:
            stream.save(state)
        if about not in results:  # it is, where the state is gone and the story begins once more
            results.add(about, found, time.perf_counter() - begin)


def run_generated(pipeline, results: Results, *, stories: int, seeds: list[int], labels: list[str]) -> None:
    """The published rule, coverage and originals with all seeds, paired, the better ones over the archive too; the
    others, for comparison, with the first seed."""
    tell = partial(tell_returns, pipeline, results, stories=stories)
    for held, rules in (("24", (BETTER, ONCE, COVERED, TODAY)), ("archive", (BETTER, ONCE, COVERED))):
        tell(seeds=seeds, held=held, rules=[label for label in rules if label in labels])
    others = [label for label, rule in RULES.items() if rule.choose is None and label not in (BETTER, COVERED, TODAY)]
    for held, rules in (("archive", (TODAY,)), ("24", others)):
        tell(seeds=seeds[:1], held=held, rules=[label for label in rules if label in labels])


def run_activation(pipeline, results: Results, *, stories: int, seeds: list[int], labels: list[str]) -> None:
    tell_activated(
        pipeline, results, stories=stories, seeds=seeds, kinds=[kind for kind in ACTIVATED if kind in labels]
    )


def run_endless(pipeline, results: Results, *, stories: int, seeds: list[int], labels: list[str]) -> None:
    """One story, whatever `stories` and `seeds` are."""
    for rule, name in ((BETTER, "better"), (ONCE, "once"), (TODAY, "today")):
        if rule in labels:
            tell_endless(
                pipeline, results, rule=rule, state=results.path.with_name(f"{results.path.stem}-{name}.state")
            )


RUNS = {"generated": run_generated, "activation": run_activation, "endless": run_endless}

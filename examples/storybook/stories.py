"""Stories of the storybook world: who is where and does what, prompt by prompt, and what every frame then shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from examples.storybook.drawing import PLACES, SHAPES
from examples.storybook.world import ACTIONS, HUES, NAMES, Frame, Look, act, entrance, prompt

CHUNK = 3  # frames denoised together


class Scene(NamedTuple):
    """What one prompt tells: indices into NAMES, PLACES and ACTIONS, and for how many chunks."""

    name: int
    place: int
    action: int
    chunks: int


@dataclass(frozen=True)
class Story:
    """Scenes, and what the prompts do not repeat or never say: the look of every name, the landmark's hue per place."""

    scenes: list[Scene]
    looks: list[Look]
    landmarks: list[int]

    @property
    def chunks(self) -> int:
        return sum(scene.chunks for scene in self.scenes)

    def prompts(self) -> list[str]:
        """One text per scene; the first one about a character says how it looks."""
        met: set[int] = set()
        texts = []
        for scene in self.scenes:
            look = None if scene.name in met else self.looks[scene.name]
            met.add(scene.name)
            texts.append(prompt(NAMES[scene.name], PLACES[scene.place], ACTIONS[scene.action], look))
        return texts

    def frames(self) -> np.ndarray:
        """[chunks * CHUNK] int64, the `Frame.number` of each frame."""
        numbers, before = [], None
        for scene in self.scenes:
            action = ACTIONS[scene.action]
            if before is None or (before.name, before.place) != (scene.name, scene.place):
                step = entrance(action)
            states, step = act(action, scene.chunks * CHUNK, step)
            look = self.looks[scene.name]
            numbers += [
                Frame(scene.place, self.landmarks[scene.place], look.hue, look.shape, mood, at).number
                for mood, at in states
            ]
            before = scene
        return np.array(numbers, dtype=np.int64)

    def scene_of_chunks(self) -> np.ndarray:
        """[chunks] int64, the number of each chunk's scene."""
        return np.repeat(np.arange(len(self.scenes)), [scene.chunks for scene in self.scenes])


def random_cast(random: np.random.Generator) -> tuple[list[Look], list[int]]:
    """A look for every name, all different, and a hue for every place's landmark."""
    looks = random.permutation(len(HUES) * len(SHAPES))[: len(NAMES)]
    return (
        [Look(int(look) // len(SHAPES), int(look) % len(SHAPES)) for look in looks],
        [int(hue) for hue in random.integers(len(HUES), size=len(PLACES))],
    )


def training_story(random: np.random.Generator, chunks: int) -> Story:
    """A random story of so many chunks, in which characters and places come back, often after an absence.

    Every fifth story takes its time: scenes of up to a dozen chunks.
    """
    looks, landmarks = random_cast(random)
    names = random.permutation(len(NAMES))[: random.integers(3, len(NAMES) + 1)]
    places = random.permutation(len(PLACES))[: random.integers(3, len(PLACES) + 1)]
    lengths, shares = ([2, 4, 8, 12], [0.3, 0.3, 0.2, 0.2]) if random.random() < 0.2 else ([1, 2, 3], [0.75, 0.2, 0.05])
    scenes: list[Scene] = []
    left = chunks
    while left:
        length = min(left, int(random.choice(lengths, p=shares)))
        name, place = int(random.choice(names)), int(random.choice(places))
        # Those who were in the story, but neither at its beginning nor just now, where sink and window show them.
        away = {scene.name for scene in scenes[1:-2]} - {scene.name for scene in (*scenes[:1], *scenes[-2:])}
        if away and random.random() < 0.85:
            name = int(random.choice(sorted(away)))
        if scenes and random.random() < 0.1:
            name, place = scenes[-1].name, scenes[-1].place
        scenes.append(Scene(name, place, int(random.integers(len(ACTIONS))), length))
        left -= length
    return Story(scenes, looks, landmarks)

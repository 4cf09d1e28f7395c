"""Stories of the storybook world: who is where and does what. Random ones to train on, and trials of a memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from examples.storybook.drawing import PLACES, SHAPES
from examples.storybook.world import ACTIONS, HUES, NAMES, Frame, Look, act, entrance, prompt

CHUNK = 3  # frames denoised together
_MET = 4  # characters and places that are met and come back
LENGTHS = {"short": 2, "long": 8}  # scenes between the meetings and the returns


class Scene(NamedTuple):
    """What one prompt tells: indices into NAMES, PLACES and ACTIONS, and for how many chunks."""

    name: int
    place: int
    action: int
    chunks: int


@dataclass(frozen=True)
class Script:
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


def training_script(random: np.random.Generator, chunks: int) -> Script:
    """The script of a random story of so many chunks, in which characters and places come back, often after an absence.

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
    return Script(scenes, looks, landmarks)


@dataclass(frozen=True)
class Trial:
    """The script of a story of one chunk per scene, and what is asked of it.

    A first scene that the sink holds; four meetings, of a character in a place each; `between` scenes of others; four
    returns, of every one of these characters to another one's place.
    """

    script: Script
    between: int
    chunks = 1

    @property
    def meetings(self) -> range:
        return range(1, 1 + _MET)

    @property
    def returns(self) -> range:
        first = 1 + _MET + self.between
        return range(first, first + _MET)

    def met_at(self, scene: int) -> tuple[int, int]:
        """The scenes where the character and where the place of the return at `scene` were met."""
        wanted = self.script.scenes[scene]
        names = [i for i in self.meetings if self.script.scenes[i].name == wanted.name]
        places = [i for i in self.meetings if self.script.scenes[i].place == wanted.place]
        return names[0], places[0]

    def useful_frames(self, scene: int) -> list[int]:
        """Numbers of the past frames, first ones of a chunk, that show the scene's character or place."""
        wanted = self.script.scenes[scene]
        past = self.script.scenes[:scene]
        return [i * CHUNK for i, s in enumerate(past) if s.name == wanted.name or s.place == wanted.place]


def recall_trial(random: np.random.Generator, between: int) -> Trial:
    """A random trial; `between` is at least 2, so that nothing that returns is in the window."""
    if between < 2:
        raise ValueError(f"between must be at least 2, or the window may still show what returns, got {between}")
    looks, landmarks = random_cast(random)
    names, places = random.permutation(len(NAMES)).tolist(), random.permutation(len(PLACES)).tolist()

    def scene(name: int, place: int) -> Scene:
        return Scene(name, place, int(random.integers(len(ACTIONS))), 1)

    others, elsewhere = (names[0], names[-1]), (places[0], places[-1])
    scenes = [scene(names[0], places[0])]
    scenes += [scene(names[i], places[i]) for i in range(1, 1 + _MET)]
    scenes += [scene(int(random.choice(others)), int(random.choice(elsewhere))) for _ in range(between)]
    scenes += [scene(names[i], places[i % _MET + 1]) for i in range(1, 1 + _MET)]
    return Trial(Script(scenes, looks, landmarks), between)


@dataclass(frozen=True)
class Wandering:
    """The script of a story in which anybody may be anywhere, often more than once, and what is asked of it.

    Its last `returned` scenes are returns: of a character to a place where it never was, with neither in the sink nor
    in the window. chunks: of a scene.
    """

    script: Script
    returned: int
    chunks: int

    @property
    def returns(self) -> range:
        return range(len(self.script.scenes) - self.returned, len(self.script.scenes))

    @property
    def meetings(self) -> list[int]:
        """The scenes where a character is introduced."""
        names = [scene.name for scene in self.script.scenes]
        return [i for i, name in enumerate(names) if name not in names[:i]]

    def met_at(self, scene: int) -> tuple[int, int]:
        """The scenes where the character and where the place of `scene` came first."""
        wanted = self.script.scenes[scene]
        names = [i for i, told in enumerate(self.script.scenes) if told.name == wanted.name]
        places = [i for i, told in enumerate(self.script.scenes) if told.place == wanted.place]
        return names[0], places[0]


def wandering(random: np.random.Generator, scenes: int, returned: int, chunks: int) -> Wandering:
    """A random story; chunks is at least 2, so that the window shows no more than the scene before."""
    if chunks < 2:
        raise ValueError(f"chunks must be at least 2, or the window shows more than one scene, got {chunks}")
    looks, landmarks = random_cast(random)
    every = [(name, place) for name in range(len(NAMES)) for place in range(len(PLACES))]
    told: list[tuple[int, int]] = []
    while len(told) < scenes:
        if len(told) < scenes - returned:
            fitting = [pair for pair in every if not told or pair != told[-1]]
        else:
            met = [{pair[i] for pair in told} - {told[0][i], told[-1][i]} for i in (0, 1)]
            fitting = [pair for pair in every if pair[0] in met[0] and pair[1] in met[1] and pair not in told]
        told = [*told, fitting[int(random.integers(len(fitting)))]] if fitting else []  # no return fits: once more
    made = [Scene(name, place, int(random.integers(len(ACTIONS))), chunks) for name, place in told]
    return Wandering(Script(made, looks, landmarks), returned, chunks)

"""Stories that test a memory: who and what comes back after an absence longer than the window."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from examples.storybook.drawing import PLACES
from examples.storybook.stories import CHUNK, Scene, Story, random_cast
from examples.storybook.world import ACTIONS, NAMES

_MET = 4  # characters and places that are met and come back
LENGTHS = {"short": 2, "long": 8}  # scenes between the meetings and the returns


@dataclass(frozen=True)
class Trial:
    """A story of one chunk per scene and what is asked of it.

    A first scene that the sink holds; four meetings, of a character in a place each; `between` scenes of others; four
    returns, of every one of these characters to another one's place. first_return: the scene where they begin.
    """

    story: Story
    between: int

    @property
    def meetings(self) -> range:
        return range(1, 1 + _MET)

    @property
    def returns(self) -> range:
        first = 1 + _MET + self.between
        return range(first, first + _MET)

    def met_at(self, scene: int) -> tuple[int, int]:
        """The scenes where the character and where the place of the return at `scene` were met."""
        wanted = self.story.scenes[scene]
        names = [i for i in self.meetings if self.story.scenes[i].name == wanted.name]
        places = [i for i in self.meetings if self.story.scenes[i].place == wanted.place]
        return names[0], places[0]

    def useful_frames(self, scene: int) -> list[int]:
        """Numbers of the past frames, first ones of a chunk, that show the scene's character or place."""
        wanted = self.story.scenes[scene]
        past = self.story.scenes[:scene]
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
    return Trial(Story(scenes, looks, landmarks), between)

"""The storybook world: its words, what a frame can show, and the picture of every such frame."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from examples.storybook.drawing import COLOURS, MOODS, PLACES, SHAPES, SIZE, SPRITE, draw_character, draw_place

NAMES = ("bo", "mia", "kip", "lu", "ned", "ada")
ACTIONS = ("walks left", "walks right", "jumps", "waits")
HUES = tuple(COLOURS)
STEPS = 16  # places side by side where a character can be; the last is next to the first
FPS = 8.0
_PREPOSITIONS = {"beach": "on", "mountain": "on", "meadow": "in", "forest": "in", "desert": "in", "village": "in"}
_STEP = SIZE // STEPS
BOTTOM = SIZE - 10  # row below a character's shadow
_SIZES = (len(PLACES), len(HUES), len(HUES), len(SHAPES), len(MOODS), STEPS)


class Look(NamedTuple):
    """How a character looks: indices into HUES and SHAPES."""

    hue: int
    shape: int


class Frame(NamedTuple):
    """All there is to see in a frame, as indices; fields may be whole numbers or tensors of them.

    place: of PLACES. landmark: its landmark's colour, of HUES. hue, shape: the character's. mood: of MOODS.
    step: where the character is, 0 (left) to STEPS - 1.
    """

    place: int | Tensor
    landmark: int | Tensor
    hue: int | Tensor
    shape: int | Tensor
    mood: int | Tensor
    step: int | Tensor

    @property
    def number(self) -> int | Tensor:
        """One number for all fields, from 0 to `frame_count()` - 1."""
        number = 0
        for value, size in zip(self, _SIZES, strict=True):
            number = number * size + value
        return number

    @classmethod
    def of(cls, number: int | Tensor) -> Frame:
        """The inverse of `number`."""
        values = []
        for size in reversed(_SIZES):
            values.append(number % size)
            number = number // size
        return cls(*reversed(values))


def frame_count() -> int:
    """How many different frames there are."""
    return int(np.prod(_SIZES))


def words() -> list[str]:
    """Every word that a prompt of this world can have, punctuation too."""
    sentences = [prompt(name, place, action) for name in NAMES for place in PLACES for action in ACTIONS]
    sentences += [prompt("bo", "beach", "waits", Look(h, s)) for h in range(len(HUES)) for s in range(len(SHAPES))]
    text = " ".join(sentences).replace(",", " ,").replace(".", " .")
    return sorted(set(text.split()))


def prompt(name: str, place: str, action: str, look: Look | None = None) -> str:
    """ "bo jumps on the beach.", or with a look: "bo, a white star, jumps on the beach.\""""
    appearance = ""
    if look is not None:
        hue, shape = HUES[look.hue], SHAPES[look.shape]
        appearance = f", {'an' if hue[0] in 'aeiou' else 'a'} {hue} {shape},"
    return f"{name}{appearance} {action} {_PREPOSITIONS[place]} the {place}."


def act(action: str, frames: int, step: int) -> tuple[list[tuple[int, int]], int]:
    """(mood, step) of each of `frames` frames of an action that begins at `step`, and the step where it ends."""
    if action in ("walks left", "walks right"):
        mood, direction = (MOODS.index("left"), -1) if action == "walks left" else (MOODS.index("right"), 1)
        states = [(mood, (step + direction * i) % STEPS) for i in range(frames)]
        return states, (step + direction * frames) % STEPS
    cycle = ("stand", "low", "high", "high", "low", "stand") if action == "jumps" else ("stand",) * 5 + ("blink",)
    return [(MOODS.index(cycle[i % 6]), step) for i in range(frames)], step


def entrance(action: str) -> int:
    """The step where a character begins that was not in the picture before."""
    return {"walks left": STEPS - 3, "walks right": 2}.get(action, STEPS // 2)


# -- pictures --------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def backgrounds() -> Tensor:
    """[places, landmark colours, SIZE, SIZE, 3] float32 from 0 to 1."""
    pictures = [[draw_place(place, rgb) for rgb in COLOURS.values()] for place in PLACES]
    return torch.from_numpy(np.array(pictures)).float()


@lru_cache(maxsize=1)
def sprites() -> Tensor:
    """[hues, shapes, moods, stride, SPRITE, SPRITE, 4] float32, colours multiplied by alpha."""
    palette = torch.tensor(list(COLOURS.values())).float() / 255
    colour = torch.cat([palette, torch.zeros(len(HUES), 1)], 1).view(-1, 1, 1, 1, 1, 1, 4)
    black, body = _drawn_bodies()
    return black + body.unsqueeze(-1) * colour


@lru_cache(maxsize=1)
def _drawn_bodies() -> tuple[Tensor, Tensor]:
    """Characters in black [shapes, moods, stride, SPRITE, SPRITE, 4], and how much of each pixel takes their colour."""
    drawn = [
        [
            [
                [draw_character(shape, rgb, mood, stride) for rgb in ((0, 0, 0), (255, 255, 255))]
                for stride in (False, True)
            ]
            for mood in MOODS
        ]
        for shape in SHAPES
    ]
    black, white = torch.from_numpy(np.array(drawn)).float().unbind(3)
    return black, (white - black)[..., 0]


def render(frame: Frame) -> Tensor:
    """Pictures of frames whose fields are tensors [n]: [n, SIZE, SIZE, 3] float32 from 0 to 1."""
    picture = backgrounds()[frame.place, frame.landmark].clone()
    sprite = sprites()[frame.hue, frame.shape, frame.mood, frame.step % 2]
    area = picture[:, BOTTOM - SPRITE : BOTTOM]
    columns = sprite_columns(frame.step)[:, None, :, None].expand(-1, SPRITE, -1, 3)
    behind = area.gather(2, columns)
    area.scatter_(2, columns, behind * (1 - sprite[..., 3:]) + sprite[..., :3])
    return picture


def character_mask(shape: Tensor, mood: Tensor, step: Tensor) -> Tensor:
    """How much of each pixel the character's shape colours: [n, SIZE, SIZE] float32 from 0 to 1."""
    return _place_mask(_drawn_bodies()[1][shape, mood, step % 2], step)


def landmark_mask() -> Tensor:
    """How much of each pixel the landmark colours, [places, SIZE, SIZE] float32 from 0 to 1."""
    first, second = HUES.index("red"), HUES.index("blue")
    palette = torch.tensor(list(COLOURS.values())).float() / 255
    difference = backgrounds()[:, first] - backgrounds()[:, second]
    return (difference.abs().sum(-1) / (palette[first] - palette[second]).abs().sum()).clamp(0, 1)


def sprite_columns(step: Tensor) -> Tensor:
    """Columns of the picture that a character covers at `step` [n]: [n, SPRITE] int64, around the edge if need be."""
    return (step[:, None] * _STEP + _STEP // 2 - SPRITE // 2 + torch.arange(SPRITE)) % SIZE


def _place_mask(mask: Tensor, step: Tensor) -> Tensor:
    whole = torch.zeros(len(step), SIZE, SIZE)
    area = whole[:, BOTTOM - SPRITE : BOTTOM]
    area.scatter_(2, sprite_columns(step)[:, None].expand(-1, SPRITE, -1), mask)
    return whole

"""What a picture shows, read from its pixels: the place, the landmark's colour, and a character's look and pose.

Nothing is learnt. The place is the one whose drawing is nearest. Shape and pose are those of the drawing that is
nearest around the characters. A colour is the palette colour nearest to the mean inside the drawn mask, of the landmark
or of that character.

A landmark's colour is the model's own idea, which need not be one of the palette. So whether it is the same as before
is asked of the mean colours themselves: `same_colour`.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from examples.storybook.drawing import COLOURS, MOODS, SHAPES, SIZE, SPRITE
from examples.storybook.world import (
    BOTTOM,
    STEPS,
    Frame,
    backgrounds,
    character_mask,
    landmark_mask,
    sprite_columns,
    sprites,
)

_ROWS = slice(BOTTOM - SPRITE, BOTTOM)  # where characters are
_COARSE = 4  # pixels that are averaged, both ways, before shapes and poses are compared


def measure(pictures: Tensor) -> Frame:
    """What pictures [n, SIZE, SIZE, 3], 0 to 1, show: a `Frame` of tensors [n]."""
    if pictures.ndim != 4 or pictures.shape[1:] != (SIZE, SIZE, 3):
        raise ValueError(f"pictures must be [n, {SIZE}, {SIZE}, 3], got {list(pictures.shape)}")
    place = _place(pictures)
    landmark = _nearest(landmark_colour(pictures, place))
    pose = _pose(pictures, place, landmark)
    hue = _nearest(_mean_colour(pictures, character_mask(*pose) > 0.99))
    return Frame(place, landmark, hue, *pose)


def landmark_colour(pictures: Tensor, place: Tensor) -> Tensor:
    """Mean colour [n, 3], 0 to 1, of where pictures [n, SIZE, SIZE, 3] of places [n] show the landmark."""
    return _mean_colour(pictures, landmark_mask()[place])


def same_colour(one: Tensor, other: Tensor) -> Tensor:
    """Whether colours [..., 3] are nearer to each other than half the least distance of two palette colours: [...]"""
    return torch.linalg.vector_norm(one - other, dim=-1) < torch.pdist(_palette()).min() / 2


def from_video(video: Tensor) -> Tensor:
    """uint8 video [n, SIZE * k, SIZE * k, 3], upscaled by any k -> pictures as `measure` takes them."""
    scale = video.shape[1] // SIZE
    return video[:, scale // 2 :: scale, scale // 2 :: scale].float() / 255


def _place(pictures: Tensor) -> Tensor:
    """Nearest background, whatever its landmark's colour and, mostly, away from where characters are."""
    weight = 1 - landmark_mask().unsqueeze(-1)  # [places, SIZE, SIZE, 1]
    weight[:, _ROWS] *= 0.2
    weight, drawn, seen = _coarse(weight), _coarse(backgrounds()[:, 0]), _coarse(pictures)
    distance = [((seen - d).square() * w).sum((1, 2, 3)) / w.sum() for d, w in zip(drawn, weight, strict=True)]
    return torch.stack(distance, 1).argmin(1)


def _mean_colour(pictures: Tensor, mask: Tensor) -> Tensor:
    mask = mask.to(pictures.dtype)
    total = torch.einsum("nrcd,nrc->nd", pictures, mask)
    return total / mask.sum((1, 2)).clamp(min=1).unsqueeze(-1)


def _nearest(colour: Tensor) -> Tensor:
    return torch.cdist(colour, _palette()).argmin(1)


def _palette() -> Tensor:
    return torch.tensor(list(COLOURS.values())) / 255


def _pose(pictures: Tensor, place: Tensor, landmark: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Shape, mood and step of the nearest drawing; of all colours the best counts."""
    seen = _coarse(pictures[:, _ROWS])
    found = torch.zeros(len(pictures), dtype=torch.int64)
    pairs = torch.stack([place, landmark], 1)
    for pair in pairs.unique(dim=0):
        here = (pairs == pair).all(1)
        drawn = _drawings(*pair.tolist()).flatten(1)
        found[here] = (drawn.square().sum(1) - 2 * seen[here].flatten(1) @ drawn.T).argmin(1)
    found = found % (len(SHAPES) * len(MOODS) * STEPS)
    return found // (len(MOODS) * STEPS), found // STEPS % len(MOODS), found % STEPS


@lru_cache(maxsize=48)
def _drawings(place: int, landmark: int) -> Tensor:
    """Every character in every pose in a place, coarse: [hues * shapes * moods * steps, rows, columns, 3]."""
    character = _coarse(sprites().flatten(0, 2).flatten(0, 1)).unflatten(0, (-1, 2))  # [looks and moods, stride, ...]
    behind = _coarse(backgrounds()[place, landmark, _ROWS][None])[0]
    drawn = behind.expand(len(character), STEPS, -1, -1, -1).clone()
    for step in range(STEPS):
        columns = sprite_columns(torch.tensor([step]))[0, ::_COARSE] // _COARSE
        colour, alpha = character[:, step % 2].split([3, 1], -1)
        drawn[:, step, :, columns] = behind[:, columns] * (1 - alpha) + colour
    return drawn.flatten(0, 1)


def _coarse(x: Tensor) -> Tensor:
    """[n, rows, columns, c], averaged."""
    return avg_pool2d(x.permute(0, 3, 1, 2), _COARSE).permute(0, 2, 3, 1)

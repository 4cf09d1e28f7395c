"""The pictures of the storybook, drawn in code: six places with a landmark each, and characters of four shapes.

Everything is drawn four times as large and averaged down, which smooths the edges.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

SIZE = 128  # pixels of a frame, both ways
SPRITE = 48  # pixels of a character with its shadow, both ways
_SCALE = 4
INK = (38, 34, 54)

COLOURS = {
    "red": (222, 48, 52),
    "orange": (245, 142, 32),
    "yellow": (250, 216, 56),
    "green": (52, 158, 74),
    "blue": (46, 92, 222),
    "purple": (138, 62, 190),
    "pink": (250, 142, 190),
    "white": (250, 250, 250),
}
SHAPES = ("ball", "box", "cone", "star")
MOODS = ("stand", "blink", "left", "right", "low", "high")  # what a character does in a frame
_LIFT = {"low": 7, "high": 12}  # pixels off the ground


class _Canvas:
    """PIL's drawing in pixels of the final picture."""

    def __init__(self, size: int, background: tuple[int, ...]):
        self.size = size
        self.image = Image.new("RGBA" if len(background) == 4 else "RGB", (size * _SCALE,) * 2, background)
        self.draw = ImageDraw.Draw(self.image)

    @staticmethod
    def _scaled(points):
        return [tuple(value * _SCALE for value in point) for point in points]

    def polygon(self, points, fill, line=0.0):
        points = self._scaled(points)
        self.draw.polygon(points, fill=fill)
        if line:
            self.draw.line([*points, points[0], points[1]], fill=INK, width=round(line * _SCALE), joint="curve")

    def box(self, left, top, right, bottom, fill, line=0.0, radius=0.0):
        corners = self._scaled([(left, top), (right, bottom)])
        width = round(line * _SCALE)
        self.draw.rounded_rectangle(corners, radius * _SCALE, fill=fill, outline=INK if width else None, width=width)

    def disc(self, x, y, radius, fill, line=0.0, squash=1.0):
        corners = self._scaled([(x - radius, y - radius * squash), (x + radius, y + radius * squash)])
        width = round(line * _SCALE)
        self.draw.ellipse(corners, fill=fill, outline=INK if width else None, width=width)

    def line(self, points, fill, width):
        self.draw.line(self._scaled(points), fill=fill, width=round(width * _SCALE), joint="curve")

    def sky(self, top, bottom, height):
        rows = np.linspace(0, 1, height * _SCALE)[:, None, None]
        band = np.asarray(top) * (1 - rows) + np.asarray(bottom) * rows
        band = np.broadcast_to(band, (height * _SCALE, self.size * _SCALE, 3)).astype(np.uint8)
        self.image.paste(Image.fromarray(band), (0, 0))

    def hill(self, left, right, base, height, fill, line=0.0):
        xs = np.linspace(left, right, 60)
        arch = [(x, base - height * math.cos((x - (left + right) / 2) / (right - left) * math.pi)) for x in xs]
        self.polygon([*arch, (right, self.size), (left, self.size)], fill, line)

    def pixels(self) -> np.ndarray:
        """[size, size, channels] float64 from 0 to 1; colours of a transparent canvas come multiplied by alpha."""
        values = np.asarray(self.image, np.float64) / 255
        if values.shape[2] == 4:
            values[..., :3] *= values[..., 3:]
        return values.reshape(self.size, _SCALE, self.size, _SCALE, -1).mean((1, 3))


# -- places: each draws itself, its landmark in `colour` -------------------------------------------------------------


def _beach(c: _Canvas, colour) -> None:
    c.sky((120, 196, 244), (206, 236, 250), 60)
    c.disc(108, 16, 8, (255, 232, 130))
    c.box(0, 56, 128, 84, (44, 142, 206))
    for x in range(-4, 128, 16):
        c.line([(x, 66), (x + 6, 64), (x + 12, 66)], (140, 206, 238), 1.4)
        c.line([(x + 8, 75), (x + 14, 73), (x + 20, 75)], (140, 206, 238), 1.4)
    c.polygon([(66, 56), (104, 56), (97, 63), (72, 63)], (126, 78, 48), 1.5)
    c.line([(84, 56), (84, 15)], INK, 2)
    c.polygon([(86, 17), (86, 53), (109, 53)], colour, 1.5)
    c.polygon([(82, 21), (82, 53), (65, 53)], colour, 1.5)
    c.box(0, 82, 128, 128, (240, 212, 150))
    for x, y in ((20, 96), (58, 118), (88, 92), (112, 112), (36, 110)):
        c.disc(x, y, 1.3, (214, 180, 118))
    c.line([(17, 86), (20, 60), (25, 36)], (140, 96, 58), 5)
    for dx, dy in ((-18, 8), (-15, -5), (2, -12), (17, -4), (16, 9)):
        c.line([(25, 36), (25 + dx * 0.6, 34 + dy * 0.5 - 3), (25 + dx, 36 + dy)], (44, 148, 82), 5)


def _meadow(c: _Canvas, colour) -> None:
    c.sky((132, 204, 248), (222, 242, 252), 80)
    for x, y in ((28, 16), (96, 12)):
        for dx, r in ((-8, 5), (0, 7), (8, 5)):
            c.disc(x + dx, y, r, (255, 255, 255))
    c.hill(50, 170, 92, 36, (142, 204, 98))
    c.hill(-40, 86, 92, 28, (116, 188, 88))
    c.box(15, 42, 45, 66, (246, 232, 206), 1.5)
    c.polygon([(10, 44), (30, 18), (50, 44)], colour, 1.5)
    c.box(25, 49, 35, 66, colour, 1.5)
    c.box(0, 84, 128, 128, (96, 172, 72))
    for x, y, petal in (
        (12, 92, "white"),
        (40, 116, "yellow"),
        (70, 94, "pink"),
        (98, 114, "white"),
        (118, 94, "yellow"),
    ):
        c.disc(x, y, 2, COLOURS[petal])
        c.disc(x, y, 0.8, (250, 190, 40))
    c.line([(104, 82), (104, 60)], (122, 82, 52), 4)
    c.disc(104, 50, 13, (66, 146, 70))
    c.disc(96, 56, 8, (66, 146, 70))
    c.disc(112, 57, 8, (66, 146, 70))


def _mountain(c: _Canvas, colour) -> None:
    c.sky((168, 190, 222), (226, 232, 242), 90)
    for left, top, right, y in ((-20, 38, 64, 24), (60, 96, 140, 42)):
        c.polygon([(left, 92), (top, y), (right, 92)], (126, 136, 164))
        c.polygon(
            [(top - 11, y + 19), (top, y), (top + 9, y + 19), (top + 2, y + 14), (top - 4, y + 20)], (250, 250, 255)
        )
    c.disc(80, 22, 15, colour, 1.5)
    c.line([(69, 33), (76, 44)], INK, 1)
    c.line([(91, 33), (84, 44)], INK, 1)
    c.line([(80, 8), (80, 36)], INK, 0.8)
    c.box(75, 43, 85, 51, (158, 106, 62), 1.2)
    c.box(0, 84, 128, 128, (240, 244, 250))
    c.hill(-10, 60, 90, 8, (240, 244, 250))
    for x, h in ((112, 30), (124, 22), (8, 20)):
        for step in range(3):
            y = 88 - h + step * h / 4
            c.polygon([(x, y), (x - 5 - 2 * step, y + h / 3), (x + 5 + 2 * step, y + h / 3)], (38, 98, 84))
    for x, y in ((24, 98), (60, 116), (92, 100)):
        c.line([(x, y), (x + 12, y)], (208, 218, 234), 1.6)


def _forest(c: _Canvas, colour) -> None:
    c.sky((20, 22, 62), (54, 58, 118), 92)
    for x, y in ((10, 10), (26, 24), (58, 8), (74, 20), (118, 30), (92, 8), (44, 18), (108, 8)):
        c.disc(x, y, 1.1, (255, 250, 214))
    c.disc(22, 14, 8, (250, 240, 190))
    c.disc(26, 12, 7, (26, 28, 70))
    for x, h in ((6, 48), (30, 36), (52, 46), (76, 34), (124, 46)):
        c.polygon([(x, 88 - h), (x - 13, 90), (x + 13, 90)], (22, 60, 62))
        c.polygon([(x, 80 - h), (x - 9, 70), (x + 9, 70)], (26, 72, 68))
    c.box(88, 28, 110, 88, (196, 190, 200), 1.5)
    c.polygon([(83, 30), (99, 4), (115, 30)], colour, 1.5)
    c.box(88, 36, 110, 46, colour, 1.5)
    c.box(96, 54, 102, 63, (255, 226, 120), 1.2, 3)
    c.box(0, 84, 128, 128, (30, 78, 60))
    for x, y in ((14, 94), (52, 116), (84, 94), (116, 114), (34, 104)):
        c.line([(x - 3, y), (x - 1, y - 4), (x, y)], (58, 120, 82), 1.2)
        c.line([(x, y), (x + 2, y - 5), (x + 4, y)], (58, 120, 82), 1.2)


def _desert(c: _Canvas, colour) -> None:
    c.sky((250, 170, 110), (255, 226, 170), 84)
    c.disc(22, 24, 10, (255, 246, 200))
    c.hill(-30, 80, 94, 20, (228, 160, 92))
    c.hill(40, 170, 94, 30, (236, 172, 100))
    c.polygon([(64, 66), (91, 18), (118, 66)], colour, 1.5)
    c.polygon([(91, 18), (118, 66), (98, 66)], tuple(int(v * 0.82) for v in colour), 1.2)
    c.line([(80, 36), (96, 36)], INK, 0.8)
    c.line([(72, 51), (98, 51)], INK, 0.8)
    c.box(0, 84, 128, 128, (246, 194, 122))
    for x, y in ((14, 112), (70, 96), (96, 116)):
        c.line([(x, y), (x + 8, y - 2), (x + 18, y)], (222, 164, 94), 1.6)
    c.line([(30, 88), (30, 58)], (62, 130, 78), 6)
    c.line([(30, 76), (20, 76), (20, 64)], (62, 130, 78), 4.5)
    c.line([(30, 70), (40, 70), (40, 62)], (62, 130, 78), 4.5)


def _village(c: _Canvas, colour) -> None:
    c.sky((246, 196, 196), (252, 232, 216), 90)
    for x, width, top, wall, roof in (
        (2, 24, 50, (226, 208, 182), (150, 84, 70)),
        (76, 24, 54, (214, 196, 206), (112, 92, 130)),
        (102, 24, 46, (230, 216, 178), (140, 96, 70)),
    ):
        c.box(x, top, x + width, 88, wall, 1.3)
        c.polygon([(x - 3, top), (x + width / 2, top - 16), (x + width + 3, top)], roof, 1.3)
        c.box(x + 8, top + 9, x + 16, top + 18, (255, 236, 160), 1.1)
    c.box(32, 22, 70, 88, colour, 1.5)
    c.polygon([(28, 24), (51, 3), (74, 24)], (96, 80, 96), 1.5)
    c.disc(51, 34, 7, (252, 248, 236), 1.3)
    c.line([(51, 34), (51, 29)], INK, 1.2)
    c.line([(51, 34), (54, 36)], INK, 1.2)
    c.box(0, 84, 128, 128, (190, 176, 172))
    for row, y in enumerate(range(92, 128, 10)):
        for x in range(-8 + 8 * (row % 2), 128, 16):
            c.line([(x + 2, y), (x + 12, y)], (166, 152, 150), 1.5)


_PLACES: dict[str, Callable] = {
    "beach": _beach,
    "meadow": _meadow,
    "mountain": _mountain,
    "forest": _forest,
    "desert": _desert,
    "village": _village,
}
PLACES = tuple(_PLACES)


def draw_place(place: str, colour: tuple[int, int, int]) -> np.ndarray:
    """A place whose landmark has `colour` (RGB, 0 to 255): [SIZE, SIZE, 3] float64 from 0 to 1."""
    canvas = _Canvas(SIZE, (0, 0, 0))
    _PLACES[place](canvas, colour)
    return canvas.pixels()


# -- characters ------------------------------------------------------------------------------------------------------


def draw_character(shape: str, colour: tuple[int, int, int], mood: str, stride: bool) -> np.ndarray:
    """A character on its own: [SPRITE, SPRITE, 4] float64, colours multiplied by alpha. stride: which foot is ahead."""
    c = _Canvas(SPRITE, (0, 0, 0, 0))
    lift = _LIFT.get(mood, 0)
    x, ground = SPRITE / 2, SPRITE - 4
    c.disc(x, ground, 13 - lift * 0.3, (20, 20, 40, 90), squash=0.22)
    _feet(c, x, ground - lift, mood, stride)
    y = ground - lift - 17
    colour = (*colour, 255)
    if shape == "ball":
        c.disc(x, y, 14, colour, 1.8)
    elif shape == "box":
        c.box(x - 13, y - 13, x + 13, y + 13, colour, 1.8, 2)
    elif shape == "cone":
        c.polygon([(x, y - 16), (x + 16, y + 13), (x - 16, y + 13)], colour, 1.8)
    else:
        turns = [math.pi / 5 * i for i in range(10)]
        radii = [17.5 if i % 2 == 0 else 8.5 for i in range(10)]
        points = [(x + r * math.sin(t), y + 1 - r * math.cos(t)) for t, r in zip(turns, radii, strict=True)]
        c.polygon(points, colour, 1.8)
    _face(c, x, y + (3 if shape == "cone" else 0), mood)
    return c.pixels()


def _feet(c: _Canvas, x: float, ground: float, mood: str, stride: bool) -> None:
    ink = (*INK, 255)
    reach = {"left": -3, "right": 3}.get(mood, 0)
    for side in (-1, 1):
        ahead = (side == 1) == stride
        dx = side * 6 + (reach if ahead else -reach)
        c.line([(x + side * 5, ground - 6), (x + dx, ground - 1)], ink, 2.2)
        c.disc(x + dx + reach * 0.3, ground - 1 - (2 if reach and ahead else 0), 3, ink, squash=0.7)


def _face(c: _Canvas, x: float, y: float, mood: str) -> None:
    ink, white = (*INK, 255), (255, 255, 255, 255)
    x += {"left": -3, "right": 3}.get(mood, 0)
    for side in (-4.5, 4.5):
        if mood == "blink":
            c.line([(x + side - 2.5, y - 2), (x + side + 2.5, y - 2)], ink, 1.8)
        else:
            c.disc(x + side, y - 2, 3.6, white, 1.0)
            look = {"left": -1.3, "right": 1.3}.get(mood, 0)
            c.disc(x + side + look, y - 2 - (1 if mood in _LIFT else 0), 1.7, ink)
    if mood in _LIFT:
        c.disc(x, y + 5, 2.4, ink)
    else:
        c.line([(x - 3, y + 4), (x, y + 5.4), (x + 3, y + 4)], ink, 1.4)

"""Texts in the picture of a report: fonts that have their letters; prompts, above their chunks where each has room
without a broken word, else numbered and listed below; and what each called for."""

from __future__ import annotations

import functools
import io
import re
import textwrap
import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Iterable
from contextlib import suppress

from matplotlib import font_manager
from matplotlib.patches import Rectangle
from PIL import Image

# Whatever of these is installed is asked for letters that matplotlib's own font, the first, does not have.
_FAMILIES = (
    "DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Noto Sans JP", "Noto Sans KR",
    "Source Han Sans SC", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Droid Sans Fallback", "PingFang SC",
    "Hiragino Sans", "Apple SD Gothic Neo", "Arial Unicode MS", "Microsoft YaHei", "Yu Gothic", "Malgun Gothic",
    "Noto Sans", "Noto Sans Devanagari", "Noto Sans Bengali", "Noto Sans Tamil", "Noto Sans Thai", "Noto Sans Arabic",
    "Noto Sans Hebrew", "Nirmala UI", "Leelawadee UI", "Segoe UI Symbol", "Noto Sans Symbols2",
)  # fmt: skip

_UNSEEN = ("Cc", "Cf", "Zs", "Zl", "Zp")
_WIDE = "[\u1100-\u115f\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\uff00-\uff60\U00020000-\U0003fffd]"
_CLOSING = "[\u2026\u3001\u3002\u3009\u300b\u300d\u300f\u3011\uff01\uff09\uff0c\uff0e\uff1a\uff1b\uff1f!?.,:;)]"
_WORD = re.compile(f"{_WIDE}{_CLOSING}*|(?:(?!{_WIDE}).)+")

Scene = tuple[int, int, str]  # first chunk, end, prompt
Colour = Callable[[int], tuple]  # of the prompt of that number

_WIDTH = 11.1  # of the film, inches
_LETTERS_PER_INCH = 14.5
_INK = "#2b2d3a"
_STYLE = {"fontsize": 8, "va": "top", "color": _INK, "linespacing": 1.25, "parse_math": False}
_LINE, _GAP = 0.155, 0.06  # inches
CALLED_HEIGHT = 1.75  # inches
_FACE = 0.62  # from one frame to the next
_ROWS = 2
_LISTED, _NUMBERED = 600, 150  # prompts, at most: a picture has an end


def families(text: str) -> list[str]:
    """The fonts of this machine that `text` needs, in the order in which they are asked."""
    chosen, left = [], {ord(letter) for letter in text}
    for name, letters in _letters().items():
        if left & letters or not chosen:
            chosen.append(name)
            left -= letters
    return chosen


@functools.cache
def _letters() -> dict[str, frozenset[int]]:
    """Font family -> the code points that it has."""
    known = {entry.fname for entry in font_manager.fontManager.ttflist}
    for path in font_manager.findSystemFonts():  # matplotlib remembers those of its first start
        if path not in known:
            with suppress(Exception):  # a broken font is none
                font_manager.fontManager.addfont(path)
    found = {}
    for entry in font_manager.fontManager.ttflist:
        if entry.name in _FAMILIES and entry.name not in found:
            with suppress(OSError, RuntimeError):  # matplotlib remembers fonts that are gone, too
                found[entry.name] = frozenset(font_manager.get_font(entry.fname).get_charmap())
    return {name: found[name] for name in _FAMILIES if name in found}


def missing(texts: Iterable[str]) -> set[str]:
    """The letters of `texts` that no font here has: they would be drawn as boxes."""
    wanted = {letter for text in texts for letter in text if unicodedata.category(letter) not in _UNSEEN}
    known = frozenset().union(*_letters().values())
    return {letter for letter in wanted if ord(letter) not in known}


def wide(text: str) -> int:
    """Columns that `text` takes: Chinese, Japanese and Korean letters take two."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def longest_word(text: str) -> int:
    """Columns of the longest part that may not be broken."""
    return max((wide(word) for _, word in _words(text)), default=0)


def fit(text: str, columns: int, lines: int) -> str:
    """`text` wrapped to at most `lines` lines; what is cut ends in "…". Empty if not even a word fits."""
    if columns < 6:
        return ""
    wrapped = [""]
    for space, word in _words(text):
        if wide(wrapped[-1] + space + word) <= columns:
            wrapped[-1] += space + word if wrapped[-1] else word
            continue
        first, *rest = textwrap.wrap(word, columns)  # one longer than a line has to be broken
        wrapped += [first, *rest] if wrapped[-1] else rest
        wrapped[0] = wrapped[0] or first
    if len(wrapped) > lines:
        last = wrapped[lines - 1]
        while last and wide(last) + 2 > columns:
            last = last[:-1]
        wrapped = [*wrapped[: lines - 1], f"{last.rstrip()} …"]
    return "\n".join(wrapped)


def _words(text: str) -> list[tuple[str, str]]:
    """(space before it, word): what may not be broken. A wide letter is a word, its punctuation with it."""
    found = []
    for part in text.split():
        space = " "
        for word in re.findall(_WORD, part):
            found.append((space if found else "", word))
            space = ""
    return found


def size_in_inches(axes) -> tuple[float, float]:
    """(width, height)."""
    box, size = axes.get_position(), axes.figure.get_size_inches()
    return box.width * size[0], box.height * size[1]


def scene_of(scenes: list[Scene], chunk: int) -> int | None:
    """Which of `scenes`, in order, a chunk belongs to; None: to none."""
    at = bisect_right(scenes, chunk, key=lambda scene: scene[0]) - 1
    return at if at >= 0 and chunk < scenes[at][1] else None


def fits(scenes: list[Scene], chunks: int) -> bool:
    """Whether every prompt can stand above its chunks without a broken word; `chunks` make the whole width."""
    return len(scenes) < 2 or all(
        longest_word(prompt) <= _columns((stop - start) * _WIDTH / chunks) for start, stop, prompt in scenes
    )


def draw_strip(axes, scenes: list[Scene], colour: Colour, numbered: bool) -> None:
    """Every prompt, or its number, above its chunks."""
    inches_per_chunk = size_in_inches(axes)[0] / (scenes[-1][1] - scenes[0][0])
    for number, (start, stop, prompt) in enumerate(scenes):
        axes.axvspan(start, stop, 0, 1, facecolor=colour(number), alpha=0.16, linewidth=0)
        axes.axvspan(start, stop, 0.76 if numbered else 0.93, 1, facecolor=colour(number), linewidth=0)
        if numbered:
            if number % -(-len(scenes) // _NUMBERED):
                continue
            centre = {"ha": "center", "va": "center", "fontsize": 8 if len(scenes) < 50 else 6.5}
            axes.text((start + stop) / 2, 0.37, str(number + 1), color=_INK, clip_on=True, **centre)
            continue
        text = fit(prompt, columns=_columns((stop - start) * inches_per_chunk), lines=5)
        axes.text(start + 0.07 / inches_per_chunk, 0.87, text, clip_on=True, family=families(text), **_STYLE)
    axes.set_ylim(0, 1)
    axes.axis("off")


class PromptList:
    """The numbered prompts in columns.

    Attributes:
        height: that it needs, inches.
    """

    def __init__(self, scenes: list[Scene]):
        many = len(scenes) > 24
        self._count = 3 if many else 2
        columns = int(_WIDTH / self._count * _LETTERS_PER_INCH) - 6
        self._more = len(scenes[_LISTED:])
        texts = [fit(prompt, columns, lines=2 if many else 4) for _, _, prompt in scenes[:_LISTED]]
        rows = -(-len(texts) // self._count)
        self._columns = [list(enumerate(texts))[first : first + rows] for first in range(0, len(texts), rows)]
        self.height = max(sum(_height(text) for _, text in column) for column in self._columns)
        self.height += _height("") * bool(self._more)

    def draw(self, axes, colour: Colour) -> None:
        """Fill `axes`, which is as high as it needs."""
        width, height = size_in_inches(axes)
        axes.set(xlim=(0, width), ylim=(height, 0))
        axes.axis("off")
        for place, column in enumerate(self._columns):
            left, top = place * width / self._count, 0.0
            for number, text in column:
                mark = Rectangle((left, top), 0.07, _height(text) - 0.03, facecolor=colour(number), linewidth=0)
                axes.add_patch(mark)
                axes.text(left + 0.34, top + 0.01, str(number + 1), ha="right", **_STYLE)
                axes.text(left + 0.42, top + 0.01, text, family=families(text), **_STYLE)
                top += _height(text)
        if self._more:
            axes.text(width, height - _height(""), f"and {self._more:,} more", ha="right", **_STYLE)


def draw_called(
    axes,
    scenes: list[Scene],
    called: dict[int, list[tuple[int, str]]],
    thumbnails: dict[int, bytes],
    prompt_colour: Colour,
) -> None:
    """Draw below each prompt as many of the frames that it was shown as it began as there is room for, each underlined
    in the colour of its own prompt, and the words that called for them.

    Args:
        axes: what it is drawn on; x is counted in chunks.
        scenes: first chunk, end and prompt of each stretch.
        called: chunks that the bank showed, and words, by chunk that was made.
        thumbnails: JPEG, by chunk, of those too.
        prompt_colour: of the prompt with this number.
    """
    limits = axes.get_xlim()
    width, height = size_in_inches(axes)
    per_inch, cell = (limits[1] - limits[0]) / width, height / _ROWS
    for number, (start, stop, _) in enumerate(scenes):
        columns = int((stop - start) / per_inch / _FACE)
        for place, (chunk, words) in enumerate(called.get(start, [])[: columns * _ROWS]):
            left, upper = start + (place % columns * _FACE + 0.04) * per_inch, height - place // columns * cell
            image = Image.open(io.BytesIO(thumbnails[chunk]))
            size = min(_FACE - 0.08, (cell - 0.2) * image.width / image.height)
            tall = size * image.height / image.width
            extent = (left, left + size * per_inch, (upper - tall) / height, upper / height)
            axes.imshow(image, extent=extent, aspect="auto")
            of = scene_of(scenes, chunk)
            axes.plot(
                extent[:2],
                (extent[2],) * 2,
                color=prompt_colour(number if of is None else of),
                linewidth=2.5,
                solid_capstyle="butt",
            )
            style = {"fontsize": 6.5, "va": "top", "color": _INK, "parse_math": False, "family": families(words)}
            words = words[:40]  # of the narrowest letters there is room for fewer
            label = axes.text(left, extent[2] - 0.03 / height, words, **style)
            while label.get_window_extent().width > (_FACE - 0.04) * axes.figure.dpi:  # a word less, or a letter
                words = words.rpartition(", ")[0] or words[:-1]
                label.set_text(words)
    note = "as it began\nit was shown,\ncalled for by"
    axes.text(-0.004, 0.5, note, transform=axes.transAxes, fontsize=8, color=_INK, ha="right", va="center")
    axes.set_xlim(limits)
    axes.set_ylim(0, 1)
    axes.axis("off")


def _height(text: str) -> float:
    return _GAP + _LINE * (text.count("\n") + 1)


def _columns(inches: float) -> int:
    """Letters that stand side by side."""
    return int(inches * _LETTERS_PER_INCH) - 2

"""The picture of a `MemoryReport`.

From top to bottom: the film; its prompts; the memory; where the bank's frames come from; what each prompt called for.
In the memory both axes are time: along a row runs the life of one remembered chunk, in a column stands all that one new
chunk could look back to, and faintly what was held besides and not recalled. Prompts too many to stand above their
chunks are numbered there and listed below.

Every colour has one meaning: cold ones are prompts, warm ones relevance, greys the sink and the window.
"""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.collections import PolyCollection
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from memflow.output.texts import (
    CALLED_HEIGHT,
    PromptList,
    Scene,
    draw_called,
    draw_strip,
    families,
    fits,
    scene_of,
    size_in_inches,
)

_PROMPT_COLOURS = (
    "#3f78b5", "#3aa68a", "#8a5fb0", "#5cbcd6", "#2c5d8a", "#8fae4a", "#b58fd0", "#1f7a6c", "#8aa2c8", "#5b4a9e",
)  # fmt: skip
_MANY_PROMPTS = LinearSegmentedColormap.from_list("prompts", ("#7ccfb6", "#4aa3c8", "#3f78b5", "#5b4a9e", "#b58fd0"))
_RELEVANCE = LinearSegmentedColormap.from_list("relevance", ("#ffdf8e", "#f9a13c", "#dc5a1e", "#8c1d18"))
_WINDOW, _SINK, _INK, _QUIET, _FAINT = "#e9eaed", "#c6c9d0", "#2b2d3a", "#6a6c7a", "#d9dae2"
_HELD = "#f6edd6"  # and not shown
_SWITCH = {"color": _INK, "linewidth": 0.7, "linestyle": (0, (4, 3))}


class Held(NamedTuple):
    """A past chunk that is held. held: share of the layers that hold it. shown: share of those whose bank shows it to
    attention. relevance: 0 (least) to 1 (most). places: share of the bank's places that show it."""

    chunk: int
    held: float
    shown: float
    relevance: float
    places: float


class Entry(NamedTuple):
    """What is drawn of a chunk. thumbnail: JPEG. sink, window: first chunk and end. called: chunks that the bank shows,
    and the words that called for them."""

    index: int
    prompt: str
    thumbnail: bytes
    bank: list[Held]
    sink: tuple[int, int]
    window: tuple[int, int]
    called: Sequence[tuple[int, str]] = ()


class Timeline:
    """Draws `entries`, one per chunk in order. x and y are counted in chunks, their tick labels in seconds."""

    def __init__(self, entries: list[Entry], title: str, subtitle: str, seconds_per_chunk: float):
        self._entries = entries
        self._title, self._subtitle = title, subtitle
        self._seconds_per_chunk = seconds_per_chunk
        self._first, self._stop = entries[0].index, entries[-1].index + 1
        self._scenes = _scenes(entries)
        self._list = None if fits(self._scenes, self._stop - self._first) else PromptList(self._scenes)

    def draw(self) -> Figure:
        """The whole picture."""
        strip, list_height = (0.3, self._list.height) if self._list else (1.0, 0.0)  # inches, as all here
        thumbnails = {entry.index: entry.thumbnail for entry in self._entries}
        begun = {start for start, _, _ in self._scenes}
        called = {entry.index: [(n, words) for n, words in entry.called if n in thumbnails] for entry in self._entries}
        called = {chunk: shown for chunk, shown in called.items() if shown and chunk in begun}
        called_height = CALLED_HEIGHT if called else 0.0
        height, below = 10.0 + strip + called_height + list_height, called_height + list_height
        figure = Figure(figsize=(13, height), facecolor="white")
        rows = figure.add_gridspec(
            4, 2, height_ratios=(0.85, strip, 6.6, 0.8), width_ratios=(0.9, 12), left=0.045, right=0.975,
            top=1 - 0.935 / height, bottom=(0.6 + below) / height, hspace=0.06, wspace=0.012,
        )  # fmt: skip
        film = figure.add_subplot(rows[0, 1])
        prompts, memory, origin = (figure.add_subplot(rows[i, 1], sharex=film) for i in (1, 2, 3))
        faces = figure.add_subplot(rows[2, 0], sharey=memory)
        film.set_xlim(self._first, self._stop)
        headline = {"fontsize": 17, "fontweight": "bold", "color": _INK, "parse_math": False}
        figure.text(0.045, 1 - 0.385 / height, self._title, va="center", family=families(self._title), **headline)
        figure.text(0.045, 1 - 0.715 / height, self._subtitle, fontsize=9.5, color=_QUIET, va="center")
        self._draw_film(film)
        draw_strip(prompts, self._scenes, self._prompt_colour, numbered=self._list is not None)
        self._draw_memory(memory)
        self._draw_faces(faces)
        self._draw_origin(origin)
        self._legend(memory)
        left, right = film.get_position().x0, film.get_position().x1
        if called:
            strip = (left, (0.06 + list_height) / height, right - left, (called_height - 0.06) / height)
            axes = figure.add_axes(strip, sharex=film)
            draw_called(axes, self._scenes, called, thumbnails, self._prompt_colour)
        if self._list:
            below = figure.add_axes((left, 0.06 / height, right - left, list_height / height))
            self._list.draw(below, self._prompt_colour)
        return figure

    def _draw_film(self, axes) -> None:
        width, height = size_in_inches(axes)
        first = Image.open(io.BytesIO(self._entries[0].thumbnail))
        places = max(1, round(width / (height * first.width / first.height)))
        step = (self._stop - self._first) / places
        for place in range(places):
            left = self._first + place * step
            entry = self._entries[min(int(left + step / 2) - self._first, len(self._entries) - 1)]
            image = Image.open(io.BytesIO(entry.thumbnail))
            axes.imshow(image, extent=(left + 0.015 * step, left + 0.985 * step, 0, 1), aspect="auto")
        axes.set_xlim(self._first, self._stop)
        axes.set_ylim(0, 1)
        axes.axis("off")

    def _draw_memory(self, axes) -> None:
        least = 0.022 / size_in_inches(axes)[1] * self._stop  # a bar that can be seen, in chunks
        ground, bank = [], []
        for entry in self._entries:
            for (start, stop), colour in ((entry.window, _WINDOW), (entry.sink, _SINK)):
                ground.append((entry.index, start, stop - start, to_rgba(colour)))
            for held in entry.bank:
                if held.held > held.shown:
                    height = max(least, 0.86 * held.held)
                    ground.append((entry.index, held.chunk + 0.5 - height / 2, height, to_rgba(_HELD)))
                if held.shown:
                    height = max(least, 0.86 * held.shown)
                    colour = (*_RELEVANCE(held.relevance)[:3], 0.35 + 0.65 * held.shown)
                    bank.append((entry.index, held.chunk + 0.5 - height / 2, height, colour))
        _draw_cells(axes, ground, zorder=1)
        _draw_cells(axes, bank, zorder=3)
        faint = _faintness(self._scenes)
        for start, _, _ in self._scenes[1:]:
            axes.axvline(start, **_SWITCH, alpha=faint, zorder=4)
            axes.axhline(start, color=_INK, linewidth=0.5, alpha=faint / 2, linestyle=(0, (4, 3)), zorder=2)
        axes.set_ylim(0, self._stop)
        axes.tick_params(labelleft=False, left=False, labelbottom=False, bottom=False)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axes.spines[side].set_color(_FAINT)

    def _draw_faces(self, axes) -> None:
        """Thumbnails of the chunks that were held longest, at their place on the axis of remembered time."""
        width, height = size_in_inches(axes)
        axes.set_xlim(0, 1)
        thumbnails = {entry.index: entry.thumbnail for entry in self._entries}
        placed: list[float] = []
        for chunk, _ in self._held_longest():
            if chunk not in thumbnails:
                continue
            image = Image.open(io.BytesIO(thumbnails[chunk]))
            size = 0.86 * width * image.height / image.width / height * self._stop
            centre = min(max(chunk + 0.5, size / 2), self._stop - size / 2)
            if all(abs(centre - other) > 1.08 * size for other in placed):
                placed.append(centre)
                axes.imshow(image, extent=(0, 0.86, centre - size / 2, centre + size / 2), aspect="auto", zorder=2)
                axes.plot((0.87, 1), (centre, chunk + 0.5), color=_QUIET, linewidth=0.8, clip_on=False)
        for number, (start, stop, _) in enumerate(self._scenes):
            axes.axhspan(start, stop, 0.965, 1, facecolor=self._prompt_colour(number), linewidth=0, zorder=3)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, self._stop)
        axes.tick_params(colors=_QUIET, labelsize=8, bottom=False, labelbottom=False, length=0)
        axes.set_yticks(*self._ticks(0))
        axes.set_ylabel("remembered", fontsize=9, color=_INK)
        for side in axes.spines.values():
            side.set_visible(False)

    def _draw_origin(self, axes) -> None:
        """Per chunk, the share of the bank's places that holds frames of each prompt."""
        scenes, cells = self._scenes, []
        for entry in self._entries:
            total, base = sum(held.places for held in entry.bank), 0.0
            for held in sorted(held for held in entry.bank if held.places):
                number = scene_of(scenes, held.chunk)
                colour = _FAINT if number is None else self._prompt_colour(number)
                cells.append((entry.index, base, held.places / total, to_rgba(colour)))
                base += held.places / total
        _draw_cells(axes, cells, zorder=1)
        if not cells:
            note = "the bank was empty"
            axes.text(0.5, 0.5, note, transform=axes.transAxes, ha="center", va="center", fontsize=8.5, color=_QUIET)
        for start, _, _ in scenes[1:]:
            axes.axvline(start, **_SWITCH, alpha=_faintness(scenes))
        axes.set_ylim(0, 1)
        axes.set_yticks([])
        axes.set_ylabel("bank\nby prompt", fontsize=8, color=_INK, rotation=0, ha="right", va="center")
        axes.set_xticks(*self._ticks(self._first))
        axes.tick_params(colors=_QUIET, labelsize=8, length=2)
        axes.set_xlabel("film", fontsize=9, color=_INK)
        for side in axes.spines.values():
            side.set_color(_FAINT)

    def _legend(self, axes) -> None:
        """In the upper left corner of the memory, where nothing can be: what is not made yet cannot be remembered. Of a
        resumed story something can: then where it hides least."""
        lines = [
            (_SINK, "sink: the first frames, kept for ever"),
            (_WINDOW, "window: the newest frames"),
            (_RELEVANCE(0.5), "bank: frames of the past that it shows"),
        ]
        if any(held.held > held.shown for entry in self._entries for held in entry.bank):
            lines.append((_HELD, "held, and not shown now"))
        top = 0.8 * len(lines) + 2.6
        height = 0.049 * top
        legend = axes.inset_axes((0.012, self._free(height), 0.30, height), zorder=6)
        legend.set(xticks=[], yticks=[])
        for side in legend.spines.values():
            side.set_color(_FAINT)
        for number, (colour, text) in enumerate(lines):
            y = top - 0.65 - 0.8 * number
            legend.add_patch(Rectangle((0.35, y - 0.24), 0.7, 0.48, facecolor=colour, linewidth=0))
            legend.text(1.35, y - 0.03, text, fontsize=8, va="center", color=_INK)
        legend.imshow(np.linspace(0, 1, 64)[None], extent=(4.2, 6.6, 1.75, 2.2), aspect="auto", cmap=_RELEVANCE)
        for x, y, text in (
            (1.35, 1.95, "relevance: least"),
            (6.75, 1.95, "most"),
            (1.35, 1.15, "height and strength: share of the layers"),
            (1.35, 0.55, "that show it"),
        ):
            legend.text(x, y, text, fontsize=8, va="center", color=_INK)
        legend.set(xlim=(0, 10), ylim=(0, top))

    def _free(self, height: float) -> float:
        """The lower end of that share of the memory's rows, left in it, of which least was shown, held or new."""
        weight = np.zeros(self._stop)
        for entry in self._entries[: 1 + len(self._entries) * 5 // 16]:
            weight[slice(*entry.window)] += 0.001
            for held in entry.bank:
                weight[held.chunk] += 0.01 + held.shown
        ends = np.linspace(0.98 - height, 0.06, 24)
        rows = [weight[int(end * self._stop) : math.ceil((end + height) * self._stop)] for end in ends]
        return ends[np.argmin([part.sum() for part in rows])]

    def _prompt_colour(self, number: int) -> tuple:
        """Few prompts have colours of their own; with many, colours follow the film."""
        if len(self._scenes) <= len(_PROMPT_COLOURS):
            return to_rgba(_PROMPT_COLOURS[number])
        return _MANY_PROMPTS(number / (len(self._scenes) - 1))

    def _held_longest(self) -> list[tuple[int, float]]:
        held: Counter[int] = Counter()
        for entry in self._entries:
            for place in entry.bank:
                held[place.chunk] += place.shown
        return held.most_common(40)

    def _ticks(self, first: int) -> tuple[list[float], list[str]]:
        """At most 16 round times from chunk `first` on: their positions in chunks and their labels."""
        stop = self._stop * self._seconds_per_chunk
        start = first * self._seconds_per_chunk
        steps = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600)
        step = next((step for step in steps if (stop - start) / step <= 16), 7200)
        times = range(-int(-start // step) * step, int(stop) + 1, step)
        long = stop >= 120
        return (
            [time / self._seconds_per_chunk for time in times],
            [f"{time // 60}:{time % 60:02d}" if long else f"{time} s" for time in times],
        )


def _scenes(entries: list[Entry]) -> list[Scene]:
    """(first chunk, end, prompt) of each stretch under one prompt."""
    scenes: list[Scene] = []
    for entry in entries:
        if scenes and scenes[-1][2] == entry.prompt:
            scenes[-1] = (scenes[-1][0], entry.index + 1, entry.prompt)
        else:
            scenes.append((entry.index, entry.index + 1, entry.prompt))
    return scenes


def _faintness(scenes: list[Scene]) -> float:
    """How strong a line at every prompt may be: many together are not to cover what they divide."""
    return min(0.55, 8 / len(scenes))


def _draw_cells(axes, cells: list[tuple[float, float, float, tuple]], zorder: int) -> None:
    """Rectangles one chunk wide, each (left, bottom, height, RGBA)."""
    corners = [[(x, y), (x + 1, y), (x + 1, y + height), (x, y + height)] for x, y, height, _ in cells]
    axes.add_collection(PolyCollection(corners, facecolors=[cell[3] for cell in cells], linewidths=0, zorder=zorder))

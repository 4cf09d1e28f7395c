"""The frames that each prompt was shown as it began, and the words of it that called for them; part of the report."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Sequence

from PIL import Image

from memflow.output.lettering import families
from memflow.output.prompts import Scene, size_in_inches

HEIGHT = 1.75  # inches
_FACE = 0.62  # from one frame to the next
_ROWS = 2
_INK = "#2b2d3a"


def draw_called(
    axes,
    scenes: list[Scene],
    called: dict[int, Sequence[tuple[int, str]]],
    thumbnails: dict[int, bytes],
    prompt_colour: Callable[[int], tuple],
) -> None:
    """Draw below each prompt as many frames as there is room for, each underlined in the colour of its own prompt.

    Args:
        axes: what it is drawn on; x is counted in chunks.
        scenes: first chunk, end and prompt of each stretch.
        called: chunks that the bank showed, and words, by chunk that was made.
        thumbnails: JPEG, by chunk.
        prompt_colour: of the prompt with this number.
    """
    limits = axes.get_xlim()
    width, height = size_in_inches(axes)
    per_inch, cell = (limits[1] - limits[0]) / width, height / _ROWS
    for number, (start, stop, _) in enumerate(scenes):
        shown = [(chunk, words) for chunk, words in called.get(start, ()) if chunk in thumbnails]
        columns = int((stop - start) / per_inch / _FACE)
        for place, (chunk, words) in enumerate(shown[: columns * _ROWS]):
            left, upper = start + (place % columns * _FACE + 0.04) * per_inch, height - place // columns * cell
            image = Image.open(io.BytesIO(thumbnails[chunk]))
            size = min(_FACE - 0.08, (cell - 0.2) * image.width / image.height)
            tall = size * image.height / image.width
            extent = (left, left + size * per_inch, (upper - tall) / height, upper / height)
            axes.imshow(image, extent=extent, aspect="auto")
            of = next((n for n, (begin, end, _) in enumerate(scenes) if begin <= chunk < end), number)
            axes.plot(extent[:2], (extent[2],) * 2, color=prompt_colour(of), linewidth=2.5, solid_capstyle="butt")
            text = textwrap.shorten(words, int(_FACE * 20), placeholder="").rstrip(",")
            style = {"fontsize": 6.5, "va": "top", "color": _INK, "parse_math": False, "family": families(text)}
            axes.text(left, extent[2] - 0.03 / height, text, **style)
    note = "as it began\nit was shown,\ncalled for by"
    axes.text(-0.004, 0.5, note, transform=axes.transAxes, fontsize=8, color=_INK, ha="right", va="center")
    axes.set_xlim(limits)
    axes.set_ylim(0, 1)
    axes.axis("off")

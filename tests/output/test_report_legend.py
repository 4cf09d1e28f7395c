"""Where the legend of a report stands: over nothing that is remembered, wherever the story was resumed."""

import io

import numpy as np
import pytest

from memflow.output import jpeg
from memflow.output.timeline import Entry, Held, Timeline

PICTURE = jpeg(np.zeros((8, 8, 3), np.uint8), 85, (8, 8))


def rows_below_the_legend(first: int, stop: int, remembered: dict[int, bool]) -> set[int]:
    """Of these chunks, held from the beginning on and shown or not, those that the legend hides."""
    bank = [Held(chunk, 1.0, float(shown), 0.5, 0.5 * shown) for chunk, shown in remembered.items()]
    entries = [Entry(n, "bo waits.", PICTURE, bank, (0, 1), (max(1, n - 2), n + 1)) for n in range(first, stop)]
    figure = Timeline(entries, "", "", 1.0).draw()
    figure.savefig(io.BytesIO(), format="png", dpi=20)
    memory = next(axes for axes in figure.axes if axes.child_axes)
    low, high = memory.transData.inverted().transform(memory.child_axes[0].get_window_extent())[:, 1]
    return {chunk for chunk in remembered if low < chunk + 1 and chunk < high}


@pytest.mark.parametrize("shown", [[1], [1, 2], [5], [1, 4, 7], [8, 9]])
def test_what_a_resumed_story_was_shown_is_seen(shown):
    assert not rows_below_the_legend(12, 16, dict.fromkeys(shown, True))


def test_what_was_held_alone_is_hidden_sooner_than_what_was_shown():
    hidden = rows_below_the_legend(40, 42, {chunk: chunk > 20 for chunk in range(1, 38)})
    assert max(hidden, default=0) <= 20


def test_the_legend_of_a_whole_story_stands_above_all():
    assert not rows_below_the_legend(0, 16, dict.fromkeys(range(1, 11), True))

"""The words below a frame of a report, which called for it."""

import numpy as np

from memflow.output import jpeg, texts
from memflow.output.timeline import Entry, Timeline

PICTURE = jpeg(np.zeros((8, 8, 3), np.uint8), 85, (8, 8))


def test_words_below_a_frame_do_not_reach_the_next_one():
    called = [(1, "mountain, on, the"), (2, "MMMMMMMMMMMM"), (3, "village, in")]
    entries = [Entry(n, "bo waits.", PICTURE, [], (0, 1), (max(1, n - 2), n + 1), called) for n in range(12)]
    figure = Timeline(entries, "", "", 1.0).draw()
    labels = [label for axes in figure.axes for label in axes.texts if label.get_fontsize() == 6.5]
    assert [label.get_text()[:7] for label in labels] == ["mountai", "MMMMMMM", "village"]
    assert max(label.get_window_extent().width for label in labels) <= texts._FACE * figure.dpi

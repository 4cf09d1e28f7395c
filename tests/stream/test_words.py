"""Which words called for which frame: by hand, by tokenizers of every kind, and in a story that is told."""

from __future__ import annotations

import numpy as np
import pytest

from memflow import MemFlowPipeline
from memflow.memory import MemorySnapshot
from memflow.stream.words import called_by

NAN = float("nan")


def snapshot(by_token, held, recalled) -> MemorySnapshot:
    """by_token: [layers, T, n], of one row."""
    by_token, held, recalled = (np.asarray(x, dtype=float)[:, None] for x in (by_token, held, recalled))
    relevance = by_token.sum(2)
    return MemorySnapshot(held.astype(int), relevance, recalled.astype(int), [], [], by_token)


def test_a_word_calls_for_what_it_prefers_to_the_rest():
    scores = [[5.0, 1.0, 1.0, 1.0, NAN], [1.0, 3.0, 1.0, 3.0, NAN], [7.0, 7.0, 7.0, 7.0, NAN]]
    held = [[3, 6, 9, 12, -1]]
    words = called_by(snapshot([scores], held, [[6, 3, -1]]), [["mia", "beach", "waits"]])
    assert words == [{3: ["mia"], 6: ["beach"]}], "a word that says the same of all calls for none"
    assert called_by(snapshot([scores], held, [[9]]), [["mia", "beach", None]]) == [{9: []}]


def test_the_first_layer_has_no_say_and_the_others_are_averaged_where_they_hold_a_frame():
    first = [[0.0, 9.0], [0.0, 0.0]]
    second = [[4.0, 0.0], [0.0, 2.0]]  # holds 3 and 6
    third = [[0.0, 6.0], [2.0, 0.0]]  # holds 9 and 3
    found = called_by(snapshot([first, second, third], [[6, 3], [3, 6], [9, 3]], [[3], [3], [9]]), [["bo", "sea"]])
    assert found == [{3: ["bo"], 9: ["sea"]}]


def test_a_word_of_several_tokens_is_its_strongest_one_and_three_are_told():
    scores = [[[9.0, 0.0], [2.0, 0.0], [8.0, 0.0], [7.0, 0.0], [6.0, 0.0], [1.0, 0.0]]]
    words = ["lighthouse", "lighthouse", "keeper", "red", "scarf", "the"]
    assert called_by(snapshot(scores, [[3, 6]], [[3]]), [words]) == [{3: ["lighthouse", "keeper", "red"]}]
    assert called_by(snapshot(np.zeros((1, 2, 0)), np.zeros((1, 0)), [[-1]]), [["a", "b"]]) == [{}]


def test_a_story_tells_its_words():
    """The storybook's own model: the frames of mia are called for by her name, those of the beach by its own."""
    pipeline = MemFlowPipeline.from_preset("storybook")
    story = ["bo, a red star, waits on the beach.", "mia, a blue ball, waits in the village.",
             "kip, a green box, jumps in the forest.", "mia jumps on the beach."]  # fmt: skip
    stream = pipeline.stream(story, seconds_per_prompt=1.5, seed=1)
    for _ in range(13):
        chunk = next(stream)
    words = stream.snapshot().words
    assert chunk.switched and len(words) == 1
    by_scene = {}
    for frame, said in words[0].items():
        by_scene.setdefault(frame // 12, []).extend(said)
    assert "beach" in by_scene[0] and "mia" not in by_scene[0]
    assert "mia" in by_scene[1] and "beach" not in by_scene[1]


@pytest.mark.filterwarnings("ignore::memflow.errors.MemFlowWarning")
def test_a_resumed_stream_tells_the_same(toy, tmp_path):
    stream = toy.stream(["a fox", "an owl"], seconds_per_prompt=3.75, height=32, width=32)
    for _ in range(8):
        next(stream)
    stream.save(tmp_path / "state")
    words, recalled = toy.resume(tmp_path / "state").snapshot().words, stream.snapshot().recalled[:, 0]
    assert words == stream.snapshot().words and words[0].keys() == set(recalled[1:].flatten().tolist())
    assert {word for said in words[0].values() for word in said} <= {"an", "owl"}

"""recall="originals": of the frames that answer a token the oldest counts, and no copy is shown beside it."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from memory_driver import DIM, HEADS, MemoryDriver
from test_coverage import covering, random_keys, spoken

from memflow.memory import MemoryConfig, Prompt
from memflow.memory.held import _sources
from memflow.memory.policies import Held
from memflow.memory.recall import _shared_out, originals


def of_originals(scores: list[list[float]], frames: list[int]) -> list[list[float]]:
    """Each token's relevance for the frames, the lowest one in place of all but that of the oldest that answers."""
    counted = []
    for row in scores:
        low, high = min(row), max(row)
        oldest = min(frame for frame, score in zip(frames, row, strict=True) if score >= low + 2 / 3 * (high - low))
        counted.append([score if frame == oldest else low for frame, score in zip(frames, row, strict=True)])
    return counted


def shared_out(scores: list[list[float]], chosen: list[int]) -> list[int]:
    """As many places as frames are chosen: one for each that adds to those before it, the others by what it adds."""
    best, added = [min(row) for row in scores], []
    for frame in chosen:
        added.append(sum(max(0.0, row[frame] - low) for row, low in zip(scores, best, strict=True)))
        best = [max(low, row[frame]) for row, low in zip(scores, best, strict=True)]
    places = Counter(frame for frame, gain in zip(chosen, added, strict=True) if gain > 0)
    while places.total() < len(chosen):
        places[max(chosen, key=lambda frame: added[chosen.index(frame)] / (places[frame] + 1))] += 1
    return list(places.elements())


@pytest.mark.parametrize("layers_vote", ["each", "mean"])
@pytest.mark.parametrize("policy", ["fifo", "archive"])
def test_the_bank_shows_what_plain_greed_would(policy, layers_vote):
    layers, batch = 3, 2
    held = 9 if policy == "fifo" else None
    config = MemoryConfig(policy=policy, held_frames=held, bank_frames=4, recall="originals", layers=layers_vote)
    driver = MemoryDriver(config, batch, layers, frame_keys=random_keys)
    compared = 0
    for chunk in range(22):
        driver.chunk(spoken(layers, batch, 200 + chunk))
        for layer, row in itertools.product(range(layers), range(batch)):
            frames = [frame for frame in driver.memory.held[layer, row].tolist() if frame >= 0]
            if not frames:
                continue
            text = driver.prompt.key[:, row, driver.prompt.mask[row]].double()  # [layers, T, H, D]
            keys = torch.stack([random_keys(frame).double() for frame in frames])
            scores = torch.einsum("lthd,fd->ltf", text, keys) / DIM**0.5 / HEADS
            scores = scores[layer] if layers_vote == "each" else scores[1:].mean(0)
            prior = -0.003 * scores.mean(0)
            scores = of_originals(scores.tolist(), frames)
            expected = shared_out(scores, covering(scores, prior.tolist(), min(4, len(frames))))
            shown = [frame for frame in driver.memory.shown[layer, row].tolist() if frame >= 0]
            assert sorted(shown) == sorted(frames[index] for index in expected)
            compared += len(frames) > 4
    assert compared > 20, "there was something to choose"


# A place in three scenes of four chunks, each copy a little more relevant than what it was drawn from; a visitor in
# between, and scenes of somebody else elsewhere.
PLACE, VISITOR, ELSE = torch.eye(DIM)[:3]
SCENES = (ELSE, PLACE, VISITOR, PLACE, ELSE, PLACE, ELSE)


def drawn(frame: int) -> torch.Tensor:
    return (3 + 0.01 * frame) * SCENES[min(frame // 12, len(SCENES) - 1)]


def shown(**fields) -> list[int]:
    """The bank when the visitor comes to the place, after six scenes."""
    driver = MemoryDriver(MemoryConfig(policy="archive", **fields), frame_keys=drawn)
    prompts = [says(scene) for scene in SCENES]
    for chunk in range(4 * len(SCENES)):
        driver.chunk(prompts[chunk // 4] if chunk % 4 == 0 else None)
    driver.chunk(says(PLACE, VISITOR))
    return sorted(driver.memory.shown[0, 0].tolist())


def says(*words: torch.Tensor) -> Prompt:
    text = torch.stack(words)[None, None, :, None].expand(1, 1, len(words), HEADS, DIM)
    return Prompt(text, text, torch.ones(1, len(words), dtype=torch.bool))


def test_no_copy_is_shown_beside_the_original():
    place = lambda frames: [frame for frame in frames if 12 <= frame < 24 or 36 <= frame < 48 or 60 <= frame < 72]  # noqa: E731
    visitor = range(24, 36)
    for bank in (2, 3, 5):
        frames = shown(recall="originals", bank_frames=bank)
        assert set(place(frames)) == {12}, "the first frame of the place's first scene, and no other of the place"
        assert {frame for frame in frames if frame in visitor} == {24}
        assert len(frames) == bank and set(frames) == {12, 24}, "what is left over shows the same again"
    covered = shown(recall="coverage", scene_frame="first", bank_frames=3)
    assert len(place(covered)) > 1, "coverage fills up with copies"


def test_a_frame_made_of_nan_is_shown_last_and_breaks_nothing():
    keys = lambda frame: drawn(frame) * (float("nan") if frame == 6 else 1.0)  # noqa: E731
    driver = MemoryDriver(MemoryConfig(policy="archive", recall="originals"), frame_keys=keys)
    for _ in range(16):
        driver.chunk(says(PLACE, VISITOR))
    assert 6 in driver.memory.held[0, 0].tolist()
    assert set(driver.memory.shown[0, 0].tolist()) == {12, 24}


@pytest.mark.parametrize("chooses", [{"top_k": 2}, {"activated": 0.5}])
def test_heads_that_choose_have_all_places_to_choose_from(chooses):
    frames = shown(recall="originals", bank_frames=5, **chooses)
    assert len(set(frames)) == 5 and {12, 24} < set(frames)


@pytest.mark.parametrize(
    "chooses", [{"top_k": 8}, {"top_k": 99, "query_block": 1}, {"activated": 1.0, "activation_block": 1}]
)
def test_heads_that_attend_to_all_of_it_see_what_they_see_without_a_choice(chooses):
    assert shown(recall="originals", bank_frames=5, **chooses) == shown(recall="originals", bank_frames=5)
    few = MemoryDriver(MemoryConfig(policy="archive", recall="originals", bank_frames=5, top_k=6), frame_keys=drawn)
    for _ in range(7):
        few.chunk(says(ELSE))
    assert few.memory.shown[0, 0].tolist() == [-1, -1, 9, 9, 9], "three of the sink and three places of the bank"
    one_less = {"top_k": 7} if "top_k" in chooses else {"activated": 15, "activation_block": 1}
    assert len(set(shown(recall="originals", bank_frames=5, **one_less))) == 5


@pytest.mark.parametrize(
    ("added", "places"),
    [
        ([0.5, 0.4, 0.3, 0.0], [7, 3, 9, 7]),
        ([0.9, 0.1, 0.0, 0.0], [7, 3, 7, 7]),
        ([0.6, 0.5, 0.0, 0.0], [7, 3, 7, 3]),
        ([0.3, 0.0, 0.4, 0.0], [7, 9, 9, 7]),
        ([0.0, 0.0, 0.0, 0.0], [7, 3, 9, 1]),
    ],
)
def test_places_are_shared_out_by_what_each_adds(added, places):
    chosen = torch.tensor([[[7, 3, 9, 1]]]).expand(2, 3, 4)
    assert _shared_out(chosen, torch.tensor(added).expand(2, 3, 4)).tolist() == [[places] * 3] * 2


def test_what_says_nothing_shares_out_no_places():
    """A token that is NaN for every frame, and padding with any scores."""
    scores = torch.tensor([[9.0, 0.0, 0.0, 0.0], [0.0, 5.0, 0.0, 0.0], [0.0, 0.0, 99.0, 0.0], [torch.nan] * 4])
    held = Held(
        torch.arange(4)[None, None], None, lambda: torch.zeros(1, 1, 4), None, None,
        token_relevance=lambda: scores[None, None], token_weight=torch.tensor([[0.3, 0.3, 0.0, 0.3]]),
    )  # fmt: skip
    assert originals(held, 4)[0, 0].tolist() == [0, 1, 0, 0]
    assert sorted(originals(held._replace(all_seen=False), 4)[0, 0].tolist()) == [0, 1, 2, 3]


def test_a_frame_that_is_shown_twice_is_copied_once_more_and_then_stays():
    random = np.random.default_rng(3)
    for _ in range(300):
        k = int(random.integers(1, 7))
        wanted, before = random.integers(6, size=k), random.integers(-1, 6, size=k)
        index, numbers, shown = (torch.from_numpy(x)[None, None] for x in (wanted, wanted + 10, before + 10))
        shown = shown.masked_fill(shown < 10, -1)
        source = _sources(index, numbers, shown)
        after = torch.where(source < 0, shown, source + 10)
        assert after.sort().values.equal(numbers.sort().values), (wanted, before)
        copied = k - sum((Counter(wanted.tolist()) & Counter(before.tolist())).values())
        assert (source >= 0).sum() == copied, "no frame that is shown as often as it should be is copied"


@pytest.mark.parametrize("scene_frame", ["first", "latest"])
def test_which_frame_of_a_scene_is_no_question_then(scene_frame):
    with pytest.raises(ValueError, match=f"scene_frame must be 'any' with recall='originals'.*, got '{scene_frame}'"):
        MemoryConfig(policy="archive", recall="originals", scene_frame=scene_frame)


def test_of_originals_and_a_frame_of_the_scene_the_one_that_is_given_counts():
    held = {"policy": "original", "held_frames": 9}
    original = MemoryConfig(**held, recall="originals")
    first = MemoryConfig(**held, recall="coverage", scene_frame="first")
    assert original.changed(scene_frame="first") == first
    assert first.changed(recall="originals") == original
    assert original.changed(scene_frame="any") == original.changed() == original
    with pytest.raises(ValueError, match="scene_frame must be 'any' with recall='originals'"):
        original.changed(recall="originals", scene_frame="first")
    assert original.changed(held_frames=None).recall == "relevance"

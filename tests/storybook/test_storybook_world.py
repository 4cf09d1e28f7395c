"""The world is the same every time, its prompts are all words of the tokenizer, and its pictures can be read."""

import numpy as np
import pytest
import torch

from examples.storybook.measure import from_video, landmark_colour, measure, same_colour
from examples.storybook.model import TEXT_LENGTH, build_tokenizer
from examples.storybook.stories import CHUNK, LENGTHS, Scene, Script, recall_trial, training_script
from examples.storybook.world import ACTIONS, NAMES, PLACES, STEPS, Frame, Look, act, frame_count, prompt, render


def some_frames(count: int) -> torch.Tensor:
    return torch.randint(frame_count(), (count,), generator=torch.Generator().manual_seed(7))


def test_numbers_name_frames():
    numbers = torch.cat([some_frames(1000), torch.tensor([0, frame_count() - 1])])
    assert torch.equal(Frame.of(numbers).number, numbers)


def test_pictures_are_the_same_in_any_batch():
    frame = Frame.of(some_frames(6))
    alone = torch.cat([render(Frame(*(value[i : i + 1] for value in frame))) for i in range(6)])
    assert torch.equal(render(frame), alone)
    assert alone.shape == (6, 128, 128, 3) and alone.min() >= 0 and alone.max() <= 1


def test_what_is_drawn_is_measured():
    frame = Frame.of(some_frames(120))
    found = measure(render(frame))
    for name in Frame._fields:
        assert torch.equal(getattr(found, name), getattr(frame, name)), name


def test_what_is_upscaled_is_measured():
    frame = Frame.of(some_frames(4))
    video = (render(frame) * 255).round().byte().repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert all(torch.equal(a, b) for a, b in zip(measure(from_video(video)), frame, strict=True))
    with pytest.raises(ValueError, match=r"\[4, 64, 64, 3\]"):
        measure(torch.zeros(4, 64, 64, 3))


def test_landmarks_of_one_colour_are_the_same_and_of_two_are_not():
    """Over all pictures of a place in which the character stands at the left edge, whoever it is."""
    frame = Frame.of(torch.arange(frame_count()))
    for place in range(len(PLACES)):
        here = Frame.of(torch.nonzero((frame.place == place) & (frame.step == 0) & (frame.mood == 0)).flatten())
        colours = landmark_colour(render(here), here.place)
        same = same_colour(colours[:, None], colours)
        assert torch.equal(same, here.landmark[:, None] == here.landmark)


def test_actions_can_be_told_apart_from_three_frames():
    seen = {action: act(action, CHUNK, 5)[0] for action in ACTIONS}
    assert len({tuple(states) for states in seen.values()}) == len(ACTIONS)
    assert [step for _, step in act("walks left", 4, 1)[0]] == [1, 0, STEPS - 1, STEPS - 2]


def test_every_word_is_known_and_fits():
    tokenizer = build_tokenizer()
    story = training_script(np.random.default_rng(0), 60)
    longest = prompt("bo", "beach", "walks left", Look(1, 0))
    assert longest == "bo, an orange ball, walks left on the beach."
    for text in (*story.prompts(), longest):
        tokens = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in tokens and len(tokens) <= TEXT_LENGTH
    assert tokenizer("BO jumps.").input_ids == tokenizer("bo jumps.").input_ids
    assert tokenizer.unk_token_id in tokenizer("a dragon").input_ids


def test_a_story_says_a_look_once_and_moves_on():
    scenes = [Scene(0, 1, 1, 2), Scene(0, 1, 2, 1), Scene(3, 1, 0, 1), Scene(0, 1, 3, 1)]
    story = Script(scenes, [Look(i, i % 4) for i in range(len(NAMES))], [5] * len(PLACES))
    assert story.prompts() == [
        "bo, a red ball, walks right in the meadow.",
        "bo jumps in the meadow.",
        "lu, a green star, walks left in the meadow.",
        "bo waits in the meadow.",
    ]
    frames = Frame.of(torch.from_numpy(story.frames()))
    assert frames.step.tolist() == [*range(2, 8), 8, 8, 8, 13, 12, 11, 8, 8, 8]
    assert frames.landmark.unique().tolist() == [5]


@pytest.mark.parametrize("length", LENGTHS)
def test_what_returns_in_a_trial_was_away_for_longer_than_the_window(length):
    trial = recall_trial(np.random.default_rng(1), LENGTHS[length])
    scenes = trial.script.scenes
    assert len(scenes) == trial.returns.stop and {scene.chunks for scene in scenes} == {1}
    for now in trial.returns:
        name_met, place_met = trial.met_at(now)
        assert name_met != place_met
        window = scenes[max(0, now - 2) : now]
        assert scenes[now].name not in {scene.name for scene in (*window, scenes[0])}
        assert scenes[now].place not in {scene.place for scene in (*window, scenes[0])}
        assert set(trial.useful_frames(now)) == {CHUNK * name_met, CHUNK * place_met}
    with pytest.raises(ValueError, match="between must be at least 2"):
        recall_trial(np.random.default_rng(1), 1)

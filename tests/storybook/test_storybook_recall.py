"""What is asked of rules of recall: the stories, the replay of what was read, results that go on where they were."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from examples.storybook import model, recall_report, results, retrieval, told
from examples.storybook.rules import BETTER, ONCE, RULES, TODAY, Rule, marginal_relevance, one_per_scene
from examples.storybook.stories import CHUNK, wandering
from memflow import MemFlowPipeline
from memflow.memory.policies import Held
from memflow.memory.recall import originals


@pytest.fixture(scope="module")
def untrained() -> MemFlowPipeline:
    parts = model.build(0)
    for name in ("vae", "transformer", "text_encoder"):
        parts[name].eval()
    pipeline = MemFlowPipeline(**parts, **model.settings() | {"denoising_steps": (1000, 500)})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(("scenes", "returned"), [(12, 4), (9, 4), (28, 8)])
def test_returns_bring_back_what_is_away_and_was_never_together(scenes, returned):
    random = np.random.default_rng(0)
    for _ in range(60):
        story = wandering(random, scenes, returned, 5)
        told = story.script.scenes
        assert len(told) == scenes and story.script.chunks == 5 * scenes and len(story.returns) == returned
        for scene in story.returns:
            now, past = told[scene], told[:scene]
            assert {now.name} <= {one.name for one in past} and {now.place} <= {one.place for one in past}
            assert (now.name, now.place) not in {(one.name, one.place) for one in past}
            for seen in (past[0], past[-1]):
                assert now.name != seen.name and now.place != seen.place
            character, place = story.met_at(scene)
            assert told[character].name == now.name and character in story.meetings
            assert told[place].place == now.place and all(one.place != now.place for one in told[:place])
    with pytest.raises(ValueError, match="chunks must be at least 2"):
        wandering(random, 9, 4, 1)


@pytest.mark.parametrize("held", [6, None], ids=["held", "archive"])
@pytest.mark.parametrize("label", [TODAY, BETTER, "latest of scene, then coverage"])
def test_the_replay_shows_what_a_stream_shows(untrained, held, label):
    """A stream that reads the same frames, under the same rule from the beginning, has the same frames in its bank."""
    recording = retrieval.record_returns(untrained, np.random.default_rng(3), 2, 9, 4, 2)
    config = RULES[label].config(
        untrained.memory_config, bank_frames=3, held_frames=held, policy="original" if held else "archive"
    )
    found = retrieval.shown(recording, config, RULES[label], "plain")
    expected = {name: [] for name in retrieval.MEASURES}
    driver = retrieval.ChunkDriver(retrieval.Replay(recording), config)
    of_chunk = recording.scripts[0].scene_of_chunks()
    for scene, begin in enumerate(recording.starts[:-1]):
        driver.model.prompt = recording.prompts["plain", scene]
        driver.prompt(torch.ones(2, 1, 1))
        for chunk in range(begin, recording.starts[scene + 1]):
            driver.keep(torch.full((2, 1, CHUNK, 1, 1), float(chunk)))
            if scene in recording.asked and chunk == begin:
                recalled = driver.snapshot().recalled[-1]
                for row, script in enumerate(recording.scripts):
                    seen = [script.scenes[of_chunk[frame // CHUNK]] for frame in recalled[row] if frame >= 0]
                    now = script.scenes[scene]
                    character = now.name in [one.name for one in seen]
                    place = now.place in [one.place for one in seen]
                    for name, value in zip(retrieval.MEASURES, (character, place, character and place), strict=True):
                        expected[name].append(value)
    assert found == expected and sum(found["character"]) + sum(found["place"]) > 0


def held_of(scores: torch.Tensor, scene: list[int], means: torch.Tensor) -> Held:
    scene = torch.tensor(scene)[None, None]
    frames = torch.arange(scores.shape[-1])[None, None]
    return Held(
        frames, lambda: means[None, None, :, None], lambda: scores[None, None], lambda x: x, None, lambda: scene
    )


def test_other_rules_do_what_their_names_say():
    scores = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    alike = torch.tensor([[1.0, 0.0], [1.0, 0.01], [1.0, 0.02], [-1.0, 0.1], [-1.0, 0.0]])
    held = held_of(scores, [7, 7, 9, 7, 9], alike)
    assert one_per_scene(held, 3)[0, 0].tolist() == [0, 2, 1]
    assert marginal_relevance(held, 2)[0, 0].tolist() == [0, 3], "what is unlike the best comes second"


def test_a_rule_of_its_own_chooses_in_generated_stories(untrained, tmp_path, monkeypatch):
    """Each once, where the originals are shown again in the places that are left over."""
    chosen = []

    def spied(held, k):
        once = RULES[ONCE].choose(held, k)
        chosen.extend(zip(once.flatten(0, 1).tolist(), originals(held, k).flatten(0, 1).tolist(), strict=True))
        return once

    monkeypatch.setitem(RULES, "spied", Rule(choose=spied))
    found = results.Results(tmp_path / "r.jsonl", "command", say=lambda _: None)
    told.tell_returns(untrained, found, stories=1, seeds=[5], held="24", rules=["spied"], chunks=2)
    assert chosen and all(len(set(once)) == len(once) and set(again) <= set(once) for once, again in chosen)
    assert any(len(set(again)) < len(again) for _, again in chosen)
    assert len(found.lines[0]["outcomes"]["last colour"]) == 4


def test_results_are_compared_return_by_return(tmp_path):
    path = tmp_path / "deep" / "a.jsonl"
    said: list[str] = []
    written = results.Results(path, "command", say=said.append)
    asked = {"part": "generated", "seed": 1}
    written.add(asked | {"rule": "a"}, {"landmark": [True, True, False, True]}, 1.0)
    written.add(asked | {"rule": "b"}, {"landmark": [True, False, True, False]}, 1.0)
    with path.open("a") as file:
        file.write('{"about": {"part": "gen')  # killed while it wrote
    again = results.Results(path, "command")
    assert again.lines == written.lines and said[0] == "generated, 1, a: landmark 3/4 (1 s)"
    assert asked | {"rule": "b"} in again and asked | {"rule": "c"} not in again
    one, other = again.lines
    assert results.share([one, other], "landmark") == (5, 8)
    assert results.paired([one], [other], "landmark") == (2, 1, 1.0)
    assert results.paired([one], [], "landmark") is None
    uneven = [{"about": asked, "outcomes": {"landmark": value * 6}} for value in "10"]
    assert results.paired(*([line] for line in uneven), "landmark") == (6, 0, 2 / 2**6)


def test_every_part_runs_goes_on_and_is_drawn(untrained, tmp_path, monkeypatch):
    monkeypatch.setattr(retrieval, "LENGTHS", (2,))
    labels = [TODAY, BETTER, "all", "1/9, rows"]
    said: list[str] = []

    def run():
        found = results.Results(tmp_path / "r.jsonl", "command", say=said.append)
        retrieval.run(untrained, found, stories=1, seeds=[5], labels=labels)
        told.tell_returns(untrained, found, stories=1, seeds=[5], held="24", rules=[TODAY, BETTER], chunks=2)
        told.run_activation(untrained, found, stories=1, seeds=[5], labels=labels)
        told.tell_endless(untrained, found, scenes=2, state=tmp_path / "state")
        return found.lines

    pairs = retrieval.record_pairs
    monkeypatch.setattr(retrieval, "record_pairs", lambda *arguments: pairs(*arguments[:-1], 2))  # short scenes
    lines = run()
    count = len(said)
    assert run() == lines and len(said) == count, "nothing is measured twice"
    parts = {line["about"]["part"] for line in lines}
    assert parts == {"retrieval", "generated", "activation", "endless"}
    text = recall_report.table(lines)
    assert (
        f"| 24 | {BETTER} | 4 |" in text
        and f"| short | {BETTER} | 1/9, rows | 4 |" in text
        and "| 0 to 100 | 0 of 2" in text
    )
    recall_report.plot(lines, tmp_path / "r.png")
    assert (tmp_path / "r.png").stat().st_size > 5000


@pytest.mark.slow
def test_a_story_without_end_goes_on_from_its_state(untrained, tmp_path, monkeypatch):
    """Stopped after the first hundred scenes; of one chunk each here."""
    monkeypatch.setattr(told, "SCENE_OF_ENDLESS", 1)
    paths = [tmp_path / name for name in ("one.jsonl", "two.jsonl", "three.jsonl")]
    for path in paths:
        found = results.Results(path, "command", say=lambda _: None)
        stops = itertools.count()

        def add(*line, found=found, stops=stops, path=path):
            results.Results.add(found, *line)
            if path.stem != "one" and next(stops) == 0:
                raise KeyboardInterrupt

        found.add = add
        try:
            told.tell_endless(untrained, found, scenes=110, state=path.with_suffix(".state"))
        except KeyboardInterrupt:
            if path.stem == "three":  # begins once more
                path.with_suffix(".state").unlink()
            found = results.Results(path, "command", say=lambda _: None)
            told.tell_endless(untrained, found, scenes=110, state=path.with_suffix(".state"))
    one, two, three = ([replace_seconds(line) for line in results.read(path)] for path in paths)
    assert one == two == three and len(one) == 2


def replace_seconds(line: dict) -> dict:
    return line | {"seconds": 0}


def test_a_rule_is_a_setting_or_a_choice_of_its_own(untrained):
    trained = untrained.memory_config
    for rule in RULES.values():
        config = rule.config(trained)
        assert config == replace(trained, recall=rule.recall, scene_frame=rule.scene_frame)
    assert trained == RULES[BETTER].config(trained), "the storybook's default is the better rule"

"""The trained model that ships: it loads from the package alone, is small, and remembers."""

import socket
from pathlib import Path

import pytest
import torch

from examples.storybook import recall, train_stories
from examples.storybook.model import settings
from examples.storybook.recall import Setting, settings_named
from examples.storybook.results import Results, share
from examples.storybook.rules import BETTER, TODAY
from examples.storybook.told import tell_endless
from memflow import MemFlowPipeline
from memflow.cli.story import read_stories

ROOT = Path(__file__).parents[2]
ASSETS = ROOT / "memflow" / "assets" / "storybook"


@pytest.fixture(scope="module")
def shipped() -> MemFlowPipeline:
    pipeline = MemFlowPipeline.from_preset()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_it_loads_without_a_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    pipeline = MemFlowPipeline.from_preset("storybook")
    assert pipeline.transformer.dtype == torch.float32
    assert {name: pipeline.config[name] for name in ("fps", "text_length", "height", "width", "memory")} == {
        name: settings()[name] for name in ("fps", "text_length", "height", "width", "memory")
    }


def test_it_is_small_and_has_a_card():
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) < 8_000_000
    card = (ASSETS / "README.md").read_text()
    for fact in ("license: apache-2.0", "python -m examples.storybook train", "Seed ", "torch 2."):
        assert fact in card
    assert f"{train_stories.STORIES} stories of {train_stories.CHUNKS} chunks" in card


def test_its_stories_are_made_of_its_words(shipped):
    for prompt in read_stories(ROOT / "examples" / "stories" / "bo-and-the-balloon.txt")[0].prompts:
        assert shipped.tokenizer.unk_token_id not in shipped.tokenizer(prompt).input_ids


def recalled(pipeline, setting: Setting) -> dict[str, float]:
    shares = recall.evaluate(pipeline, setting, "short", stories=8, seed=77)["shares"]
    return {name: share.value for name, share in shares.items()}


def test_it_remembers_and_not_by_chance(shipped):
    """32 returns each; the committed evaluation has the numbers, and here is a wide margin."""
    with_memory, without = (recalled(shipped, setting) for setting in settings_named(["archive", "none"]))
    assert with_memory["scene"] > 0.9 and with_memory["look"] > 0.6
    assert with_memory["colour"] > 0.5 > without["colour"] + 0.1
    assert with_memory["landmark"] > 0.6 > without["landmark"]
    assert with_memory["hit character"] > 0.8 and without["hit character"] == 0.0


def tell_long(pipeline, tmp_path, scenes: int, **changes) -> list[dict[str, float]]:
    """Shares of right places and colours in each hundred of scenes; everybody is introduced in the first ones."""
    rule = changes.pop("rule", BETTER)
    pipeline.register_to_config(memory=pipeline.config.memory | changes)
    results = Results(tmp_path / "endless.jsonl", "test")
    tell_endless(pipeline, results, rule=rule, scenes=scenes)
    return [{name: share([line], name).value for name in ("place", "colour")} for line in results.lines]


@pytest.mark.slow
def test_a_story_of_5000_chunks_stays_as_good_as_it_began(shipped, tmp_path):
    """Half an hour of film. What is told a thousand times does not drift as long as the first telling is held."""
    told = tell_long(shipped, tmp_path, 1000)
    assert len(told) == 10
    assert all(shares["place"] >= 0.95 and shares["colour"] >= 0.95 for shares in told)


@pytest.mark.slow
def test_copies_of_copies_drift(tmp_path):
    """Why `original`: `diverse` holds the latest of each kind, and today's rule shows the most relevant of them."""
    told = tell_long(MemFlowPipeline.from_preset(), tmp_path, 200, policy="diverse", rule=TODAY)
    assert all(shares["place"] >= 0.95 and shares["colour"] <= 0.9 for shares in told)

"""The statistics of the evaluation, on numbers that are known or made up."""

import json

import pytest

from examples.storybook import evaluate, model, report
from examples.storybook.evaluate import run
from examples.storybook.recall import MEASURES, SETTINGS, Share, chance_of_a_hit, settings_named, trials
from examples.storybook.stories import LENGTHS
from memflow import MemFlowPipeline


def test_wilson_intervals():
    # Newcombe 1998, table I, method 3: 81/263, 15/148, 0/20, 1/29.
    for hits, count, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        assert Share(hits, count).interval == pytest.approx((low, high), abs=1e-4)
    assert Share(1, 29).interval == pytest.approx((0.0061, 0.1718), abs=1e-4)
    assert Share(1, 2) + Share(2, 3) == Share(3, 5)


def test_an_interval_holds_its_share():
    """Rounding must not leave it out: plots draw the distances, which cannot be negative."""
    shares = [Share(hits, count) for count in range(1, 60) for hits in range(count + 1)]
    assert all(share.interval[0] <= share.value <= share.interval[1] for share in shares)


def test_chance_of_a_hit():
    assert chance_of_a_hit(10, 1, 6) == pytest.approx(0.6)
    assert chance_of_a_hit(4, 2, 1) == pytest.approx(0.5)
    assert chance_of_a_hit(5, 1, 6) == 1.0
    assert chance_of_a_hit(0, 0, 6) == chance_of_a_hit(4, 0, 3) == 0.0


def test_trials_depend_on_the_seed_alone():
    assert trials("short", 3, 5) == trials("short", 5, 5)[:3]
    assert trials("short", 3, 5) != trials("short", 3, 6)


def test_settings_are_memories_and_have_names():
    from memflow.memory import MemoryConfig

    trained = MemoryConfig(**model.MEMORY)
    assert {setting.config(trained).policy for setting in SETTINGS} == {
        "none", "fifo", "random", "prompt", "diverse", "original", "archive", "oracle"
    }  # fmt: skip
    assert settings_named(None) == SETTINGS
    assert [setting.label for setting in settings_named(["oracle", "sink"])] == ["oracle", "sink"]
    with pytest.raises(ValueError, match="unknown: nonsense; there are none, sink"):
        settings_named(["nonsense"])


def made_up() -> dict:
    share = Share(9, 12).to_dict()
    rows = {label: {"shares": dict.fromkeys(MEASURES, share), "seconds": 0.5, "chance": 0.2} for label in ("a", "b")}
    retrieval = {name: [share] * 24 for name in ("character", "place", "both")}
    about = {"command": "python -m examples.storybook evaluate", "scenes between": {"short": 2, "long": 12}}
    return {"recall": {"short": rows, "long": rows}, "retrieval": {"a": retrieval}, "about": about}


def test_a_table_and_plots_are_made(tmp_path):
    text = report.table(made_up())
    assert text.count("| a | 0.75 (0.47 to 0.91) |") == 2 and "| 0.50 |" in text
    assert "| a | 0.75 (0.70 to 0.80) |" in text  # 24 chunks of 12
    report.plot(made_up(), tmp_path / "a.png")
    report.plot_forgetting(made_up(), tmp_path / "b.png")
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("a.png", "b.png"))


def test_an_evaluation_runs_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """With an untrained model and stories shorter than usual: nothing is recalled, but all of it is counted."""
    monkeypatch.setitem(LENGTHS, "long", 3)
    monkeypatch.setattr(evaluate, "CHUNKS", 8)
    path = tmp_path / "new" / "r.json"
    parts = model.build(0)
    for name in ("vae", "transformer", "text_encoder"):
        parts[name].eval()
    pipe = MemFlowPipeline(**parts, **model.settings() | {"denoising_steps": (1000, 500)})
    said: list[str] = []
    settings = {"stories": 1, "seeds": 1, "say": said.append}
    run(pipe, path, settings=settings_named(["none"]), **settings)
    found = run(pipe, path, settings=settings_named(["none", "oracle"]), **settings)
    assert found == json.loads(path.read_text())
    assert [line.split(":")[0] for line in said] == ["none, short", "none, long", "oracle, short", "oracle, long"]
    for length in ("short", "long"):
        oracle, none = (found["recall"][length][name]["shares"] for name in ("oracle", "none"))
        assert oracle["hit character"]["value"] == oracle["hit place"]["value"] == 1.0
        assert none["hit character"]["value"] == 0.0
        assert oracle["colour"]["count"] == 4 and oracle["scene"]["count"] == 8
    assert sum(chunk["hits"] for chunk in found["retrieval"]["none"]["character"]) == 0

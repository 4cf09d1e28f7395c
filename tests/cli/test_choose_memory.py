"""Which memory `--memory`, `--held` and `--top-k` ask for, beside the one that the model was trained for."""

from dataclasses import replace

import pytest

from memflow.cli.loading import choose_memory
from memflow.cli.options import Request
from memflow.errors import MemFlowError
from memflow.memory import MemoryConfig

TRAINED = MemoryConfig(positions="relative", layers="mean", bank_frames=4, policy="diverse", held_frames=12)


def test_nothing_given_is_what_the_model_was_trained_for():
    assert choose_memory(None, None, None, TRAINED) == TRAINED


def test_another_policy_keeps_positions_votes_and_places():
    archive = choose_memory("archive", None, 2, TRAINED)
    assert (archive.policy, archive.held_frames, archive.top_k) == ("archive", None, 2)
    assert (archive.positions, archive.layers, archive.bank_frames) == ("relative", "mean", 4)
    assert choose_memory("prompt", None, None, TRAINED).held_frames is None
    assert choose_memory("prompt", 9, None, TRAINED).held_frames == 9
    assert choose_memory(None, 5, None, TRAINED).held_frames == 5
    assert choose_memory("none", None, None, TRAINED).bank_frames == 0
    assert choose_memory("prompt", None, None, MemoryConfig(policy="none")).bank_frames == 3


def test_published_keeps_what_the_model_recorded():
    published = MemoryConfig.published("single", record_interval=2, top_k=3, global_sink=False)
    assert choose_memory("published", None, None, published) == published
    assert choose_memory("published", None, 2, published) == replace(published, top_k=2)
    assert choose_memory("prompt", None, None, published).global_sink
    other = choose_memory("published", None, None, MemoryConfig(sink_frames=2, bank_frames=4, top_k=5))
    assert other == MemoryConfig.published(local_frames=11, sink_frames=2, bank_frames=4, top_k=5)


COVERED = replace(TRAINED, recall="coverage", scene_frame="first")


def test_recall_stays_where_it_has_a_meaning():
    for policy in ("archive", "original", "diverse", "fifo"):
        held = None if policy == "archive" else 9
        kept = choose_memory(policy, held, None, COVERED)
        assert (kept.recall, kept.scene_frame) == ("coverage", "first")
    for policy, held in (("prompt", None), ("random", 9), ("none", None)):
        dropped = choose_memory(policy, held, None, COVERED)
        assert (dropped.recall, dropped.scene_frame) == ("relevance", "any")
    asked = choose_memory(None, None, None, TRAINED, recall="coverage", scene_frame="latest")
    assert asked == replace(TRAINED, recall="coverage", scene_frame="latest")


@pytest.mark.parametrize("share", [float("inf"), 1.2, 7.5, float("nan")])
def test_activated_is_not_rounded(share):
    with pytest.raises(MemFlowError, match="--activated"):
        choose_memory(None, None, None, TRAINED, **Request(activated=share).further_memory())


def test_activated_above_one_counts_tokens():
    for share, kind in ((0.25, float), (1.0, float), (7.0, int)):
        found = Request(activated=share).further_memory()["activated"]
        assert found == share and type(found) is kind


def test_a_refusal_is_said_once():
    with pytest.raises(MemFlowError) as refused:
        choose_memory("published", None, None, TRAINED)
    assert str(refused.value).count("--memory published") == 1


def test_activated_and_top_k_take_each_others_place():
    rows = choose_memory(None, None, None, replace(TRAINED, top_k=3), activated=0.25, activation_block=4)
    assert (rows.top_k, rows.activated, rows.activation_block) == (None, 0.25, 4)
    frames = choose_memory(None, None, 2, rows)
    assert (frames.top_k, frames.activated, frames.activation_block) == (2, None, 4)


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"recall": "best"}, "--recall best: recall must be one of relevance, coverage"),
        ({"query_block": 4}, "--query-block 4: query_block=4 needs top_k or activated"),
        ({"activated": 2.5}, "--activated 2.5: activated must be above 0 and at most 1.0"),
    ],
)
def test_the_option_that_is_wrong_is_named(given, complaint):
    with pytest.raises(MemFlowError, match=complaint):
        choose_memory(None, None, None, TRAINED, **given)


def test_activated_is_a_share_or_a_whole_number():
    for given, taken in ((0.25, 0.25), (1.0, 1.0), (40.0, 40)):
        found = Request(activated=given).further_memory()["activated"]
        assert (found, type(found)) == (taken, type(taken))
    for given in (2.5, float("inf"), float("nan")):
        with pytest.raises(MemFlowError, match=f"--activated {given}: .*must be"):
            choose_memory(None, None, None, TRAINED, **Request(activated=given).further_memory())


def test_recall_of_what_shows_all_that_it_holds_is_refused():
    with pytest.raises(MemFlowError, match="--recall coverage: recall must be 'relevance' where held_frames is None"):
        choose_memory("prompt", None, None, TRAINED, recall="coverage")


@pytest.mark.parametrize(
    ("policy", "held", "trained", "complaint"),
    [
        ("prompt", 3, TRAINED, "--held 3: held_frames must be a whole number of at least 4, got 3"),
        ("archive", 12, TRAINED, "--held 12: held_frames must be None with policy='archive'"),
        ("published", None, TRAINED, "--memory published: the published code has absolute positions"),
        ("none", 9, TRAINED, "--held 9: held_frames must be None with policy='none'"),
        (None, 9, MemoryConfig(policy="none"), "--held 9: held_frames must be None with policy='none'"),
        (
            "published",
            9,
            MemoryConfig.published(),
            "--held 9: held_frames must be None with published_mode",
        ),
        ("published", 9, MemoryConfig(), "--held 9: held_frames must be None with published_mode"),
        (None, 9, MemoryConfig.published(), "--held 9: held_frames must be None"),
        ("archive", None, MemoryConfig(aggregate="softmax"), "--memory archive: aggregate must be 'mean'"),
    ],
)
def test_what_cannot_be_is_said(policy, held, trained, complaint):
    with pytest.raises(MemFlowError, match=complaint):
        choose_memory(policy, held, None, trained)

"""Which memory `--memory`, `--held` and `--top-k` ask for, beside the one that the model was trained for."""

from dataclasses import replace

import pytest

from memflow.cli.loading import choose_memory
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

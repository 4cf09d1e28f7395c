"""A chunk that fails before it begins is still to be made: the stream goes on, or is saved, as if nothing had been."""

import pytest
import torch

STORY = ["a red boat", "an owl"]
SMALL = {"seconds_per_prompt": 2 * 0.75, "height": 32, "width": 32}


def fails(*arguments):
    raise MemoryError("no room")


PLACES = {
    "text encoder": lambda stream: (stream, "_encode"),
    "prompt": lambda stream: (stream.driver.model, "encode_prompt"),
    "clean pass": lambda stream: (stream.driver.model, "write_clean"),
}


@pytest.fixture(scope="module")
def whole(toy):
    return list(toy.stream(STORY, **SMALL))


@pytest.mark.parametrize(
    ("place", "made"),
    [("text encoder", 0), ("text encoder", 2), ("prompt", 0), ("prompt", 2), ("clean pass", 1), ("clean pass", 2)],
)
def test_a_failure_before_a_chunk_changes_nothing(toy, whole, place, made, monkeypatch, tmp_path):
    stream = toy.stream(STORY, **SMALL)
    for _ in range(made):
        next(stream)
    with monkeypatch.context() as patched:
        patched.setattr(*PLACES[place](stream), fails)
        with pytest.raises(MemoryError, match="no room"):
            next(stream)
    assert len(stream) == len(whole) and stream.position == made
    stream.save(tmp_path / "state")
    for going_on in (toy.resume(tmp_path / "state"), stream):
        for chunk, expected in zip(going_on, whole[made:], strict=True):
            assert chunk.prompts == expected.prompts and chunk.switched == expected.switched
            assert torch.equal(chunk.latents, expected.latents)


def test_a_prompt_sent_meanwhile_goes_first(toy, monkeypatch):
    stream = toy.stream(STORY[:1], **SMALL)
    monkeypatch.setattr(stream, "_encode", fails)
    with pytest.raises(MemoryError):
        next(stream)
    monkeypatch.undo()
    stream.send("a fox")
    assert [(chunk.prompts, chunk.switched) for chunk in stream] == [
        (["a fox"], True),
        (["a fox"], False),
        ([STORY[0]], True),
        ([STORY[0]], False),
    ]

"""Streams go on as if nothing had been: after a chunk that failed before it began, and several stories from a state."""

import subprocess
import sys

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


def test_a_batch_resumes_bit_identical(tmp_path):
    """In a process of its own: torch 2.13 ended it without a word."""
    path = tmp_path / "state"
    made = (
        "import torch; from memflow_bench.untrained import noise_pipeline; pipe = noise_pipeline()\n"
        "def rest(stream): return torch.cat([chunk.latents for chunk in stream], dim=2)\n"
        "stream = pipe.stream([('a boat', 'an owl', 'a fox')], seconds_per_prompt=2.25, height=32, width=32, seed=5)\n"
        f"next(stream); stream.save({str(path)!r})\n"
        f"assert torch.equal(rest(pipe.resume({str(path)!r})), rest(stream))\n"
    )
    done = subprocess.run([sys.executable, "-c", made], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr

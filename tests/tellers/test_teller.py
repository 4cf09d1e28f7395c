"""One model tells many stories by turns: who is next, what a story's end costs the others, and what is kept."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch

from memflow.errors import MemFlowError
from memflow.stream.stream import Stream
from memflow.tellers.teller import Teller

SECONDS = 0.5625  # of noise video: 3 chunks
PROMPTS = ["bo, a red ball, jumps.", "mia, a white star, waits."]


@pytest.fixture
def teller(toy, tmp_path) -> Teller:
    return Teller(toy, tmp_path, snapshots=True)


def told(teller: Teller) -> list:
    """All turns until nothing more comes."""
    turns = []
    while (turn := teller.turn()) is not None:
        turns.append(turn)
    return turns


def alone(toy, prompts: list[str], **settings) -> list[torch.Tensor]:
    return [chunk.frames for chunk in toy.stream(prompts, **settings)]


def test_stories_take_turns_and_are_what_they_are_alone(teller, toy):
    names = [teller.begin([PROMPTS[n % 2]], seed=n, id=f"s{n}", stop=3) for n in range(3)]
    turns = told(teller)
    assert [turn.id for turn in turns] == names * 4
    assert len(teller) == 0 and all(turn.error is None for turn in turns)
    for n, name in enumerate(names):
        frames = [turn.chunk.frames for turn in turns if turn.id == name and turn.chunk]
        wanted = [chunk.frames for chunk, _ in zip(toy.stream([PROMPTS[n % 2]], seed=n), range(3), strict=False)]
        assert len(frames) == 3 and all(map(torch.equal, frames, wanted))
    assert all(turn.snapshot is not None for turn in turns if turn.chunk)


def test_who_has_waited_longest_is_next(teller):
    first = teller.begin([PROMPTS[0]])
    for _ in range(3):
        assert teller.turn().id == first
    second = teller.begin([PROMPTS[1]])
    teller.pause(first)
    assert [teller.turn().id for _ in range(2)] == [second] * 2
    teller.pause(first, False)
    assert [teller.turn().id for _ in range(4)] == [first, second] * 2
    teller.pause(first)
    teller.pause(second)
    assert teller.turn() is None and len(teller) == 2


def test_a_prompt_that_is_sent_begins_with_the_next_turn(teller):
    name = teller.begin([PROMPTS[0]])
    assert teller.turn().started is None
    teller.send(name, "first", "a")
    teller.send(name, PROMPTS[1], "b")
    turn = teller.turn()
    assert (turn.started, turn.dropped, turn.chunk.prompts, turn.chunk.switched) == ("b", ("a",), [PROMPTS[1]], True)
    assert (teller.turn().started, teller.turn().dropped) == (None, ())
    with pytest.raises(MemFlowError, match="prompt must be a text that is not blank"):
        teller.send(name, " ")
    with pytest.raises(MemFlowError, match="story nobody is not being told"):
        teller.send("nobody", "bo")


def test_a_saved_story_goes_on_as_if_it_had_never_stopped(teller, toy):
    name = teller.begin([PROMPTS[0]], seed=3)
    teller.turn()
    teller.send(name, PROMPTS[1], "b")
    teller.save(name, {"film": "a"})  # with a prompt that waits
    assert teller.turn().started == "b"  # and keeps its tag where it goes on
    wanted = teller.turn().chunk
    teller.end(name)
    assert name not in teller
    other = Teller(toy, teller.folder)
    assert other.resume(name) == name and other.stream(name).extra == {"film": "a"}
    assert other.turn().chunk.prompts == [PROMPTS[1]]
    found = other.turn().chunk
    assert torch.equal(found.frames, wanted.frames) and torch.equal(found.latents, wanted.latents)
    with pytest.raises(MemFlowError, match="being told already"):
        other.resume(name)


@pytest.mark.parametrize("name", ["", "../a", "a/b", "a.b", "a\n", "x" * 81, None, 7, "é"])
def test_ids_are_strict(teller, name):
    if name is not None:
        with pytest.raises(MemFlowError, match="id must be 1 to 80 letters"):
            teller.begin([PROMPTS[0]], id=name)
    with pytest.raises(MemFlowError, match="id must be 1 to 80 letters"):
        teller.resume(name)
    assert len(teller) == 0


def test_an_error_ends_one_story(teller, monkeypatch):
    good, bad = teller.begin([PROMPTS[0]], stop=2), teller.begin([PROMPTS[1]])
    teller.turn(), teller.turn()
    monkeypatch.setattr(teller.stream(bad).driver, "denoise", lambda latents, timestep: latents * float("nan"))
    turns = told(teller)
    assert [turn.id for turn in turns] == [good, bad, good]
    assert isinstance(turns[1].error, MemFlowError) and "NaN" in str(turns[1].error)
    assert turns[0].chunk is not None and turns[2].error is None


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, MemoryError, RuntimeError])
def test_out_of_memory_says_so_and_frees(teller, monkeypatch, kind):
    good, bad = teller.begin([PROMPTS[0]]), teller.begin([PROMPTS[1]])
    stream = teller.stream(bad)
    gone = weakref.ref(stream.driver.memory.pool)

    def denoise(latents, timestep):
        raise kind("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1000000000000 bytes")

    monkeypatch.setattr(stream.driver, "denoise", denoise)
    del stream
    assert teller.turn().id == good
    turn = teller.turn()
    monkeypatch.undo()
    gc.collect()
    assert turn.id == bad and str(turn.error).startswith("out of memory for this story; 1 others")
    assert gone() is None and bad not in teller
    assert teller.turn().id == good


def test_a_story_that_finds_no_memory_does_not_begin(teller, monkeypatch):
    def stream(prompts):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(teller.pipeline, "stream", stream, raising=False)
    with pytest.raises(MemFlowError, match="out of memory"):
        teller.begin(PROMPTS)
    assert len(teller) == 0


def test_a_story_that_cannot_be_saved_keeps_no_other_from_it(teller, toy):
    names = [teller.begin([PROMPTS[0]], seed=n) for n in range(3)]
    for _ in range(5):
        teller.turn()
    positions = {name: teller.stream(name).position for name in names}
    broken = teller.stream(names[1])
    broken.driver.begin()  # interrupted in a chunk
    del broken
    with pytest.raises(MemFlowError, match="interrupted"):
        teller.save(names[1])
    for name in (names[0], names[2]):
        assert teller.save(name).exists()
    assert len(teller) == 3 and not teller.path(names[1]).exists()
    other = Teller(toy, teller.folder)
    for name in (names[0], names[2]):
        assert other.stream(other.resume(name)).position == positions[name]


def test_without_a_folder_nothing_is_saved(toy):
    teller = Teller(toy)
    name = teller.begin(PROMPTS)
    with pytest.raises(MemFlowError, match="has no folder"):
        teller.save(name)
    assert name in teller


def test_a_prompt_that_comes_while_another_begins_is_not_told_twice(teller, monkeypatch):
    """Whoever saves meanwhile, from another thread, waits before it hands over what has been sent."""
    name = teller.begin([PROMPTS[0]], stop=4)
    teller.turn()
    teller.send(name, PROMPTS[1], "one")
    saving = threading.Thread(target=teller.save, args=(name,))
    stream, make = teller.stream(name), Stream.__next__

    def make_while_it_is_saved(self):
        if not saving.ident:
            teller.send(name, PROMPTS[0], "two")
            saving.start()
            saving.join(0.3)
        return make(self)

    monkeypatch.setattr(Stream, "__next__", make_while_it_is_saved)
    turns = [teller.turn()]
    saving.join()
    assert stream.position == 2
    turns += [teller.turn(), teller.turn()]
    assert [turn.started for turn in turns] == ["one", "two", None]
    assert [turn.chunk.prompts[0] for turn in turns] == [PROMPTS[1], PROMPTS[0], PROMPTS[0]]
    assert [turn.chunk.switched for turn in turns] == [True, True, False]

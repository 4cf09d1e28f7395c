"""What proves that a film is the one that was asked for, and who may make it."""

from __future__ import annotations

import json
import multiprocessing
import time
from dataclasses import replace

import pytest
from films import clip

from memflow.errors import MemFlowError
from memflow.output.video import VideoWriter
from memflow.tellers import records
from memflow.tellers.records import FOLDER, Task, begin, claimed, finish, is_done

TOLD = {"prompts": ["a fox"], "seed": 1, "model": "storybook"}


@pytest.fixture
def task(tmp_path) -> Task:
    (tmp_path / FOLDER).mkdir()
    return Task(tmp_path / "fox.mp4", TOLD)


def make(task: Task, number: int = 0) -> None:
    begin(task)
    with VideoWriter(task.film, 8) as video:
        for _ in range(2):
            video.write(clip(number))
    finish(task, video)


def test_a_film_is_done_when_it_was_finished(task):
    assert not is_done(task)
    begin(task)
    with VideoWriter(task.film, 8) as video:
        video.write(clip(0))
    assert not is_done(task)
    finish(task, video)
    assert is_done(task)
    assert is_done(replace(task, told=dict(reversed(TOLD.items()))))


def test_a_film_that_was_thrown_away_is_made_again(task):
    make(task)
    task.film.unlink()
    assert not is_done(task) and not is_done(replace(task, told=TOLD | {"seed": 2}))


@pytest.mark.parametrize("damage", ["cut", "longer", "another", "byte"])
def test_a_film_that_is_not_the_one_that_was_made_is_refused(task, damage):
    make(task)
    data = task.film.read_bytes()
    if damage == "another":
        with VideoWriter(task.film, 8) as video:
            video.write(clip(1))
            video.write(clip(2))
    else:
        middle = len(data) // 2
        changed = {
            "cut": data[:-1],
            "longer": data + b"more",
            "byte": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
        }
        task.film.write_bytes(changed[damage])
    with pytest.raises(MemFlowError, match="is not the film that was made of this story; --overwrite tells it anew"):
        is_done(task)
    assert not is_done(replace(task, overwrite=True))


def test_a_changed_story_is_refused_and_says_in_what_it_differs(task):
    begin(task)
    with VideoWriter(task.film, 8) as video:
        video.write(clip(0))
    other = replace(task, told=TOLD | {"seed": 2, "held": 9})
    with pytest.raises(MemFlowError, match=r"fox\.mp4: was begun with other settings, it differs in held, seed; --o"):
        is_done(other)
    make(task)
    with pytest.raises(MemFlowError, match="was made with other settings"):
        is_done(other)
    assert not is_done(replace(other, overwrite=True))


def test_what_was_begun_before_leaves_no_state(task):
    begin(task)
    task.state.write_bytes(b"of the story that was begun")
    begin(replace(task, told=TOLD | {"seed": 2}))
    assert not task.state.exists()


@pytest.mark.parametrize("content", [None, b"", b"[]", b'{"id": 1}', b"\xff"])
def test_a_film_without_a_record_is_not_touched(task, content):
    with VideoWriter(task.film, 8) as video:
        video.write(clip(0))
    if content is not None:
        task.record.write_bytes(content)
    with pytest.raises(MemFlowError, match="is there, and no record says what it tells; --overwrite replaces it"):
        is_done(task)
    assert not is_done(replace(task, overwrite=True))


def hold(task: Task, held, seconds: float) -> None:
    with claimed(task):
        held.set()
        time.sleep(seconds)


def test_a_film_is_made_by_one_process_at_a_time(task, monkeypatch):
    monkeypatch.setattr(records, "_PATIENCE", 0.3)
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    other = context.Process(target=hold, args=(task, held, 60))
    other.start()
    assert held.wait(60)
    with pytest.raises(MemFlowError, match=r"fox\.mp4: another run is making it"), claimed(task):
        pass
    other.kill()
    other.join()
    with claimed(task):  # who dies lets go
        assert task.film.exists()
    assert not task.film.exists()  # nothing was written, nothing is left


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff",
        b"7",
        b"{}",
        b"[" * 100_000,
        {"told": []},
        {"id": 7},
        {"id": "../../precious"},
        {"film": 7},
        {"film": {"frames": 24}},
    ],
    ids=lambda content: f"{content!s:.30}",
)
def test_a_damaged_record_proves_nothing(task, content):
    """Nor does it name a file to remove that is elsewhere."""
    precious = task.film.parent.parent / "precious.safetensors"
    precious.write_text("mine")
    make(task)
    if isinstance(content, dict):
        known = json.loads(task.record.read_bytes())
        content = json.dumps(known | content).encode()
    task.record.write_bytes(content)
    with pytest.raises(MemFlowError, match="no record says what it tells; --overwrite replaces it"):
        is_done(task)
    begin(task)
    assert precious.read_text() == "mine"
    assert not is_done(task)


@pytest.mark.parametrize(
    "wrong", [{"fps": 0}, {"fps": "8"}, {"frames": None}, {"frames": "24"}, {"checksum": 1.5}], ids=str
)
def test_numbers_of_a_record_that_are_none(task, wrong):
    make(task)
    known = json.loads(task.record.read_bytes())
    task.record.write_text(json.dumps(known | {"film": known["film"] | wrong}))
    with pytest.raises(MemFlowError, match="is not the film that was made of this story"):
        is_done(task)

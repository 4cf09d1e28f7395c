"""`memflow generate stories.jsonl -o FOLDER --jobs N`: films made once, whatever happens to those who make them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from memflow.cli import _with_values, main
from memflow.cli.options import Request
from memflow.cli.worker import FilmWorker
from memflow.errors import MemFlowError
from memflow.tellers.records import FOLDER, Task

SMALL = ["--height", "128", "--width", "128", "--device", "cpu"]
PROMPTS = ["bo, a red ball, jumps on the beach.", "mia, a white star, waits in the forest."]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write(path: Path, *stories: dict | str) -> Path:
    path.write_text("".join((story if isinstance(story, str) else json.dumps(story)) + "\n" for story in stories))
    return path


def start(*arguments) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "memflow", "generate", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def wait_for(condition, process, seconds: float = 120):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    return found


def films(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.mp4")}


def alone(tmp_path, story: dict, **settings) -> bytes:
    """The film of the plain command."""
    path = tmp_path / "alone.mp4"
    given = [part for name, value in settings.items() for part in ("--" + name.replace("_", "-"), str(value))]
    prompts = [part for prompt in story["prompts"] for part in ("-p", prompt)]
    assert main(["generate", *prompts, "-o", str(path), *SMALL, *given]) == 0
    return path.read_bytes()


def test_no_story_is_lost(tmp_path, capsys):
    """A worker is killed, then all are told to stop, then the same command is run again, and again."""
    stories = [{"name": f"s{n}", "prompts": PROMPTS, "seed": n, "seconds_per_prompt": 3} for n in range(6)]
    stories[5] |= {"seconds_per_prompt": 0.375}
    path, folder = write(tmp_path / "tales.jsonl", *stories, "nonsense", {"prompts": []}), tmp_path / "out"
    options = [path, "-o", folder, "--jobs", 2, "--save-every", 2, *SMALL]
    process = start(*options)
    wait_for(lambda: list(folder.glob(f"{FOLDER}/*.safetensors")), process)
    busy = [worker for worker in psutil.Process(process.pid).children() if any(
        file.path.endswith(".mp4") for file in worker.open_files())]  # fmt: skip
    busy[0].kill()
    wait_for(lambda: len(list(folder.glob("*.mp4"))) > 1, process)
    seen = set(folder.glob(f"{FOLDER}/*.safetensors"))
    wait_for(lambda: set(folder.glob(f"{FOLDER}/*.safetensors")) - seen, process)  # of a story that has just begun
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in error
    assert f"{path}, line 7: broken JSON" in error and f"{path}, line 8: the story has no prompts" in error
    lost = re.search(r"^(s\d): worker \d is gone \(killed by signal 9\), the story goes on", error, re.M)[1]
    assert "stopping after the chunks in hand" in error
    left = int(re.search(r"^left    (\d)$", out, re.M)[1])
    assert f"stopped: {left} films are not done; the same command goes on with them" in error
    states = list(folder.glob(f"{FOLDER}/*.safetensors"))
    assert states

    process = start(*options)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 2 and "Traceback" not in error
    assert len(re.findall(r"goes on after chunk [1-9]", error)) == len(states)
    assert f"told    {left}, {len(states)} of them on from a saved state\n" in out
    assert (f"\nthere   {6 - left} " in out) == (left < 6)
    made = films(folder)
    assert sorted(made) == [f"s{n}.mp4" for n in range(6)] and not list(folder.glob(f"{FOLDER}/*.safetensors"))
    for n in {int(lost[1]), 1, 5}:
        seconds = stories[n]["seconds_per_prompt"]
        assert made[f"s{n}.mp4"] == alone(tmp_path, stories[n], seed=n, seconds_per_prompt=seconds)

    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    capsys.readouterr()
    assert main(["generate", *map(str, options)]) == 2
    assert "there   6 from before" in capsys.readouterr().out
    assert times == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    stories[1]["seed"] = 7
    write(path, *stories)
    assert main(["generate", *map(str, options)]) == 2
    said = capsys.readouterr()
    assert "s1.mp4: was made with other settings, it differs in seed; --overwrite tells it anew" in said.err
    assert "there   5 from before" in said.out and films(folder) == made


def test_the_plain_command_makes_the_same_films_of_the_file(tmp_path):
    stories = [{"prompts": PROMPTS, "seed": n, "seconds_per_prompt": 0.375 * (n + 1)} for n in range(2)]
    path = write(tmp_path / "tales.jsonl", *stories)
    assert main(["generate", str(path), "-o", str(tmp_path / "out"), *SMALL]) == 0
    made = films(tmp_path / "out")
    assert sorted(made) == ["tales-1.mp4", "tales-2.mp4"]
    for n, film in enumerate(sorted(made)):
        assert made[film] == alone(tmp_path, stories[n], seed=n, seconds_per_prompt=0.375 * (n + 1))


@pytest.fixture
def worker(tmp_path):
    (tmp_path / "out" / FOLDER).mkdir(parents=True)
    request = Request(output=tmp_path / "out", device="cpu", height=128, width=128, report=True)
    return FilmWorker(request, 1, 0)


def a_task(tmp_path, **changes) -> Task:
    told = {"prompts": PROMPTS, "seed": 3, "seconds_per_prompt": 1.5, **changes}
    return Task(tmp_path / "out" / "tale.mp4", told)


def halting(after: int):
    """Whether to stop, yes from the call on after `after`."""
    calls = []
    return lambda: calls.append(1) or len(calls) > after


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"held": 1}, "--held 1: held_frames must be"),
        ({"height": 7}, "height must be a positive multiple of 128"),
        ({"top_k": 9, "activated": 0.3}, "--activated 0.3: activated must be None"),
        ({"seconds_per_prompt": 1e300}, "seconds_per_prompt must be above 0 and at most"),
    ],
    ids=["held", "height", "activated", "seconds"],
)
def test_what_no_story_can_have_is_said_once(worker, tmp_path, asked, said):
    """By the worker, before it is given any story."""
    with pytest.raises(MemFlowError, match=re.escape(said)):
        FilmWorker(Request(output=tmp_path / "out", device="cpu", **asked), 1, 0)


def test_a_story_stopped_at_any_chunk_is_the_same_film(worker, tmp_path):
    task = a_task(tmp_path)
    whole = alone(tmp_path, task.told, seed=3, seconds_per_prompt=1.5)
    positions = [list(worker.tell(task, halting(count)))[-1]["position"] for count in (0, 1, 3, 2)]
    assert positions == [0, 1, 4, 6]
    *_, last = worker.tell(task, halting(99))
    assert last["done"] and last["position"] == last["length"] == 8
    assert task.film.read_bytes() == whole and task.film.with_suffix(".png").exists()
    assert not task.state.exists() and list(worker.tell(task, halting(99))) == []


def test_a_film_lost_beside_its_state_is_told_from_the_beginning(worker, tmp_path):
    task = a_task(tmp_path)
    list(worker.tell(task, halting(3)))
    task.film.unlink()
    first, *_, last = worker.tell(task, halting(99))
    assert first["position"] == 0 and last["done"] and last["frames"] == last["made"] == 24


def test_a_state_that_cannot_be_used_stands_in_the_way_only_without_overwrite(worker, tmp_path):
    task = a_task(tmp_path)
    list(worker.tell(task, halting(3)))
    data = bytearray(task.state.read_bytes())
    data[-1] ^= 1
    task.state.write_bytes(data)
    with pytest.raises(MemFlowError, match=r"is damaged: .*; --overwrite tells the story anew"):
        list(worker.tell(task, halting(99)))
    assert task.state.read_bytes() == data and task.film.stat().st_size
    first, *_, last = worker.tell(replace(task, overwrite=True), halting(99))
    assert first["position"] == 0 and last["done"] and not task.state.exists()


def test_states_are_written_by_the_clock(worker, tmp_path, monkeypatch):
    saves, save = [], worker._teller.save
    monkeypatch.setattr(worker._teller, "save", lambda *given: saves.append(1) or save(*given))
    list(worker.tell(a_task(tmp_path), halting(99)))
    assert not saves  # a few seconds need none
    monkeypatch.setattr("memflow.cli.worker._SECONDS", 0.0)
    monkeypatch.setattr("memflow.cli.worker._SHARE", 1e9)
    task = a_task(tmp_path, seed=4)
    task.film.unlink()
    list(worker.tell(task, halting(99)))
    assert len(saves) == 7  # after every chunk but the last


def test_a_picture_of_somebody_else_stays(tmp_path, capsys):
    """Where a report would be written: its story is not told, and the picture is as it was."""
    stories = write(tmp_path / "a.jsonl", {"prompts": PROMPTS})
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "a.png").write_text("my notes")
    command = ["generate", str(stories), "-o", str(folder), "--jobs", "1", "--report"]
    assert main(command) == 2
    said = f"{folder / 'a.png'}: is there and memflow did not make it; --overwrite replaces it"
    assert said in " ".join(capsys.readouterr().err.split())
    assert (folder / "a.png").read_text() == "my notes" and not films(folder)


WRONG = {
    "generate -p fox -o out --jobs 2": "need a file of stories",
    "generate two.jsonl --jobs 2": "-o FOLDER for their films",
    "generate two.jsonl -o out --jobs 2 --save-state s --resume r --chunks 2": "--chunks, --save-state, --resume: for",
    "generate two.jsonl -o out --jobs 0": "--jobs",
    "generate -o out --ray two.jsonl": "need a file of stories",
    "generate two.jsonl -o out --ray two.jsonl": "--ray two.jsonl: is a file, not the address of a cluster",
    "generate two.jsonl -o none/out --jobs 1": "none/out: the folder cannot be made",
    "generate two.jsonl -o two.jsonl --jobs 1": "two.jsonl: the folder cannot be made",
    "generate two.jsonl -o out --jobs 1 --memory all": "--memory all: there is no such memory",
    "generate two.jsonl -o out --jobs 1 --seconds-per-prompt 0": "--seconds-per-prompt must be above 0",
}


@pytest.mark.parametrize(("command", "message"), WRONG.items(), ids=WRONG)
def test_what_is_wrong_is_said_before_anything_begins(tmp_path, monkeypatch, capsys, command, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "two.jsonl", *[{"prompts": PROMPTS}] * 2)
    assert main(command.split()) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert os.listdir(tmp_path) == ["two.jsonl"]


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ([], []),
        (["generate", "s", "--ray"], ["generate", "s", "--ray="]),
        (["generate", "s", "--ray", "-o", "d"], ["generate", "s", "--ray=", "-o", "d"]),
        (["generate", "s", "--ray", "here:1", "-o", "d"], ["generate", "s", "--ray", "here:1", "-o", "d"]),
        (["generate", "-p", "--ray is a name", "--jobs", "2"], ["generate", "-p", "--ray is a name", "--jobs", "2"]),
    ],
)
def test_the_address_of_a_cluster_may_be_left_out(given, meant):
    assert _with_values(given) == meant

"""Stories over workers that fail in every way: processes, and actors of a Ray cluster that the test starts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings

import pytest
from pool_workers import Broken, Counting, Dying, lines

from memflow.errors import MemFlowError
from memflow.tellers.actors import Actors, cluster
from memflow.tellers.pool import Processes, tell

LONG = 10_000


@pytest.fixture(scope="module")
def ray_cluster():
    pytest.importorskip("ray", reason="Ray is not installed: pip install -e '.[ray]'")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setenv("PYTHONPATH", ":".join(sys.path))  # of the cluster's workers
        warnings.simplefilter("ignore")  # of Ray's own code
        with cluster("") as resources:
            assert resources["CPU"] >= 1
            yield


@pytest.fixture(params=["processes", "ray"])
def carrier(request):
    if request.param == "processes":
        return Processes
    request.getfixturevalue("ray_cluster")
    return lambda make: Actors(make, {"num_cpus": 0.5})


def test_every_story_is_told_or_given_up(carrier, tmp_path):
    tasks = [{"steps": 3, "log": str(tmp_path / str(n))} for n in range(6)]
    tasks[1] |= {"die": "once"}
    tasks[2] |= {"die": "always"}
    tasks[3] |= {"fail": MemFlowError("it has no end")}
    tasks[4] |= {"fail": ValueError("a defect")}
    tasks[5] |= {"warn": "the word 'zoe' is not known"}
    happened = [[] for _ in tasks]
    for event in tell(carrier(Counting), 2, tasks):
        happened[event.task].append((event.kind, event.content["step"] if event.kind == "step" else event.content))
    steps = [("step", n) for n in range(3)]
    assert happened[0] == [*steps, ("told", "")]
    assert [kind for kind, _ in happened[1]] == ["step", "lost", *["step"] * 3, "told"]
    assert [kind for kind, _ in happened[2]] == ["step", "lost", "step", "lost", "step", "failed"]
    assert happened[2][-1][1].startswith("3 workers died of it, the last one ")
    assert happened[3] == [("failed", "it has no end")]
    assert happened[4] == [("failed", "ValueError: a defect")]
    assert happened[5] == [("said", "the word 'zoe' is not known"), *steps, ("told", "")]
    assert [len(lines(task["log"])) for task in tasks] == [2, 3, 3, 1, 1, 2]


def test_workers_that_cannot_be_made_end_it(carrier, tmp_path):
    tasks = [{"steps": 1, "log": str(tmp_path / "log")}]
    with pytest.raises(MemFlowError, match=r"^there is no such model$"):
        list(tell(carrier(Broken), 2, tasks))
    with pytest.raises(MemFlowError, match="workers die before they tell a story"):
        list(tell(carrier(Dying), 1, tasks))
    assert not lines(tasks[0]["log"])


def test_told_to_stop_workers_end_after_their_step(carrier, tmp_path):
    tasks = [{"steps": LONG, "pause": 0.01, "log": str(tmp_path / str(n))} for n in range(3)]
    begun, kinds = set(), {0: set(), 1: set(), 2: set()}
    for event in tell(carrier(Counting), 2, tasks, lambda: len(begun) == 2):
        begun.add(event.task)
        kinds[event.task].add(event.kind)
    assert kinds == {0: {"step", "told"}, 1: {"step", "told"}, 2: set()}
    assert all(lines(task["log"])[1].startswith("saved at ") for task in tasks[:2]) and not lines(tasks[2]["log"])


def test_a_pool_that_is_left_ends_its_workers(tmp_path):
    events = tell(Processes(Counting), 1, [{"steps": LONG, "pause": 0.01, "log": str(tmp_path / "log")}])
    pid = next(events).content["pid"]
    events.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


PROGRAM = """
import sys
from pool_workers import Counting
from memflow.tellers.pool import Processes, tell
if __name__ == "__main__":
    task = {"steps": 10_000, "pause": 0.01, "log": sys.argv[1]}
    for event in tell(Processes(Counting), 1, [task]):
        print(event.content["pid"], flush=True)
"""


def test_where_whoever_asked_is_killed_the_worker_saves_and_ends(tmp_path):
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "log")],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": ":".join(sys.path)},
    )
    worker = int(program.stdout.readline())
    program.kill()
    program.communicate()
    deadline = time.monotonic() + 20
    while len(lines(tmp_path / "log")) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert lines(tmp_path / "log")[1].startswith("saved at ")
    while _lives(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _lives(worker)


def test_sigterm_to_a_worker_alone_moves_its_story(tmp_path):
    task = {"steps": 60, "pause": 0.02, "log": str(tmp_path / "log")}
    pids, kinds = [], []
    for event in tell(Processes(Counting), 1, [task]):
        kinds.append(event.kind)
        if event.kind == "step" and event.content["pid"] not in pids:
            pids.append(event.content["pid"])
            if len(pids) == 1:
                os.kill(pids[0], signal.SIGTERM)
    assert kinds[-1] == "told" and len(pids) == 2


def _lives(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False

"""`memflow generate stories.jsonl -o FOLDER --ray`: a real cluster of two workers, one of which is killed."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import time

import psutil
import pytest

from memflow.cli import main
from memflow.tellers.records import FOLDER

ray_needed = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install -e '.[ray]'"
)
PROMPTS = ["bo, a red ball, jumps on the beach.", "mia, a white star, waits in the forest."]
STORIES = [{"name": f"s{n:02d}", "prompts": PROMPTS, "seed": n} for n in range(12)]
SMALL = ["--height", "128", "--width", "128", "--device", "cpu", "--seconds-per-prompt", "1.125"]


@ray_needed
def test_twelve_stories_and_a_killed_worker(tmp_path, capsys):
    path, folder = tmp_path / "tales.jsonl", tmp_path / "out"
    path.write_text("".join(json.dumps(story) + "\n" for story in STORIES))
    options = [str(path), "-o", str(folder), "--jobs", "2", "--save-every", "1", *SMALL]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    process = subprocess.Popen(
        [sys.executable, "-m", "memflow", "generate", *options, "--ray"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment | {"OMP_NUM_THREADS": "1"},
    )
    killed = None
    while killed is None:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
        if len(list(folder.glob("*.mp4"))) > 4 and list(folder.glob(f"{FOLDER}/*.safetensors")):
            killed = busy_actor(process.pid)
    killed.kill()
    out, error = process.communicate(timeout=240)
    assert process.returncode == 0 and "Traceback" not in error, error
    gone = re.search(
        r"^(s\d\d): worker \d is gone \(.* died unexpectedly .*\), the story goes on elsewhere$", error, re.MULTILINE
    )
    lost, after = gone[1], error[gone.end() :]
    assert re.search(rf"^{lost}: worker \d (goes on after chunk \d|begins)$", after, re.MULTILINE)
    for name in (story["name"] for story in STORIES):  # each is told once, the lost one in two parts
        assert error.count(f"{name}: 18 frames, ") == 1
        assert name == lost or len(re.findall(rf"^{name}: worker \d", error, re.MULTILINE)) == 1
    assert re.search(r"^told    12, [01] of them on from a saved state$", out, re.M) and "failed" not in out
    assert "(raylet)" not in out + error
    assert sorted(film.name for film in folder.glob("*.mp4")) == [f"{story['name']}.mp4" for story in STORIES]
    assert not list(folder.glob(f"{FOLDER}/*.safetensors"))

    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert main(["generate", *options, "--ray"]) == 0  # no cluster is started for it
    assert "told    0" in (out := capsys.readouterr().out) and "there   12 from before" in out
    assert times == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    prompts = [part for prompt in PROMPTS for part in ("-p", prompt)]
    for name in {lost, "s11"}:
        assert (
            main(["generate", *prompts, "-o", str(tmp_path / "alone.mp4"), *SMALL, "--seed", str(int(name[1:]))]) == 0
        )
        assert (folder / f"{name}.mp4").read_bytes() == (tmp_path / "alone.mp4").read_bytes()


def busy_actor(pid: int) -> psutil.Process | None:
    """A worker of the cluster that writes a film just now."""
    for process in psutil.Process(pid).children(recursive=True):
        try:
            if "_Actor" in process.name() and any(file.path.endswith(".mp4") for file in process.open_files()):
                return process
        except psutil.Error:
            continue
    return None


def test_without_ray_the_package_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    (tmp_path / "tales.jsonl").write_text(json.dumps(STORIES[0]))
    assert main(["generate", str(tmp_path / "tales.jsonl"), "-o", str(tmp_path / "out"), "--ray"]) == 2
    error = capsys.readouterr().err
    assert "--ray needs the package 'ray': " in error and "[ray]'" in error
    assert main(["generate", str(tmp_path / "tales.jsonl"), "--ray", "-o", str(tmp_path / "out")]) == 2
    assert "--ray needs the package 'ray': " in capsys.readouterr().err


@ray_needed
@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", "there is no such cluster: [Errno 111] Connection refused"),
        ("127.0.0.1:99999", "there is no such cluster"),
        ("ray://here:1", "there is no such cluster"),
        ("here", "HOST:PORT is needed"),
    ],
)
def test_a_cluster_that_is_not_there(tmp_path, capsys, address, message):
    (tmp_path / "tales.jsonl").write_text(json.dumps(STORIES[0]))
    assert main(["generate", str(tmp_path / "tales.jsonl"), "-o", str(tmp_path / "out"), "--ray", address]) == 2
    assert f"--ray {address}: {message}" in capsys.readouterr().err

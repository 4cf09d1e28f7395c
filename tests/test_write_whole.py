"""Files that are whole or not there, whoever is killed or writes at the same time."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from memflow import files
from memflow.files import write_whole

WRITER = """
import os, sys
from memflow import files
from memflow.files import write_whole
path, mark = sys.argv[1], sys.argv[2].encode()
while True:
    write_whole(path, lambda file: [file.write(mark * 1000) for _ in range(200)])
"""


@pytest.mark.parametrize("kills", [6, pytest.param(100, marks=pytest.mark.slow)])
def test_a_killed_writer_leaves_the_old_file_or_the_new_and_the_next_one_nothing_else(tmp_path, kills):
    path = tmp_path / "state"
    path.write_bytes(b"0" * 200_000)
    for number in range(kills):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(path), "ab"[number % 2]])
        time.sleep(0.25 + 0.01 * (number % 17))
        process.send_signal(signal.SIGKILL)
        process.wait()
        data = path.read_bytes()
        assert len(data) == 200_000 and len(set(data)) == 1
    write_whole(path, lambda file: file.write(b"new"))
    assert [entry.name for entry in tmp_path.iterdir()] == ["state"]


def test_a_name_with_a_number_that_no_process_has_stays(tmp_path):
    odd = tmp_path / f".memflow-{files._host()}-{10**30}-0123456789abcdef.partial"
    odd.touch()
    write_whole(tmp_path / "file", lambda file: file.write(b"new"))
    assert (tmp_path / "file").read_bytes() == b"new" and odd.exists()


def test_a_name_that_a_killed_process_left_is_removed_and_that_of_a_living_one_stays(tmp_path):
    """Killed in the instant between the name and its place."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for pid in (dead.pid, os.getppid()):
        (tmp_path / f".memflow-{files._host()}-{pid}-0123456789abcdef.partial").write_bytes(b"whole")
    (tmp_path / f".memflow-another-{dead.pid}-0123456789abcdef.partial").write_bytes(b"of another host")
    write_whole(tmp_path / "state", lambda file: file.write(b"new"))
    left = sorted(entry.name.split("-")[1:3] for entry in tmp_path.glob(".memflow-*"))
    assert left == sorted([["another", str(dead.pid)], [files._host(), str(os.getppid())]])


def test_a_name_that_a_process_of_another_user_gave_stays(tmp_path, monkeypatch):
    """It may be hidden (/proc with hidepid=2), but not from a signal."""
    theirs = tmp_path / f".memflow-{files._host()}-{os.getppid()}-0123456789abcdef.partial"
    theirs.touch()

    def refuse(pid, number):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "kill", refuse)
    monkeypatch.setattr(psutil, "pid_exists", lambda pid: False)
    write_whole(tmp_path / "file", lambda file: file.write(b"new"))
    assert theirs.exists()


def test_two_writers_and_a_reader_never_meet_a_torn_file(tmp_path):
    path = tmp_path / "state"
    path.write_bytes(b"0" * 200_000)
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), mark]) for mark in "ab"]
    try:
        begin, seen = time.time(), set()
        while (passed := time.time() - begin) < 3 or (passed < 120 and not {*b"ab"} <= seen):  # however late they begin
            data = path.read_bytes()
            assert len(data) == 200_000 and len(set(data)) == 1
            seen.add(data[0])
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
    assert {*b"ab"} <= seen


def test_what_fails_changes_nothing_and_leaves_nothing(tmp_path):
    path = tmp_path / "state"
    path.write_bytes(b"old")

    def full(file):
        file.write(b"new")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_whole(path, full)
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_a_link_is_written_through_and_permissions_stay(tmp_path):
    (tmp_path / "target").write_bytes(b"old")
    os.symlink("target", tmp_path / "link")
    for mode in (0o640, 0o666):  # more than the umask leaves to new files, too
        os.chmod(tmp_path / "target", mode)
        write_whole(tmp_path / "link", lambda file: file.write(b"new"))
        assert os.path.islink(tmp_path / "link") and (tmp_path / "target").read_bytes() == b"new"
        assert os.stat(tmp_path / "target").st_mode & 0o777 == mode


def test_what_is_no_regular_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        write_whole(tmp_path / "pipe", lambda file: file.write(b"new"))
    assert [entry.is_fifo() for entry in tmp_path.iterdir()] == [True]


def test_where_files_need_a_name_what_was_left_behind_is_removed(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "O_TMPFILE")
    left, fresh = tmp_path / ".memflow-1.partial", tmp_path / ".memflow-2.partial"
    for name in (left, fresh):
        name.write_bytes(b"half")
    os.utime(left, (0, 0))
    write_whole(tmp_path / "state", lambda file: file.write(b"new"))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".memflow-2.partial", "state"]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="the files that a process has open are listed on Linux")
def test_nothing_stays_open(tmp_path):
    write_whole(tmp_path / "state", lambda file: file.write(b"old"))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        write_whole(tmp_path / "state", lambda file: file.write(b"new"))
    assert len(os.listdir("/proc/self/fd")) == before

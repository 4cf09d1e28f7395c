"""The two sides of a comparison: which packages and which provider, and a process for each."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import memflow_kernels

from .providers.choice import OURS, is_own, own_provider

HERE = Path(__file__).parent
INSTALLED = Path(memflow_kernels.__file__).parents[1]  # the folder of the packages in use
PACKAGES = ("memflow", "memflow_kernels")
SOURCES = "csrc"
PATIENCE = 10  # seconds that a worker has to end


class Side(NamedTuple):
    """name: for the table. packages: the folder that holds memflow_kernels. provider: as `provider_named` takes it."""

    name: str
    packages: Path
    provider: str


def two_sides(against: str, provider: str, scratch: Path) -> tuple[Side, Side]:
    """(the other, this).

    Args:
        against: FILE.py:Name (another provider, the same packages), a folder that holds other packages, or a commit of
            the repository that this one runs from. provider: of this side, and of the other unless it is one itself.
        scratch: An empty folder, where a commit's files go.

    Raises:
        ValueError: None of these.
    """
    name = "this" if provider == OURS else provider
    if is_own(provider):
        own_provider(provider)
        provider = _absolute(provider)
    this = Side(name, INSTALLED, provider)
    if is_own(against):
        own_provider(against)
        return Side(against, INSTALLED, _absolute(against)), this
    if (Path(against) / PACKAGES[1]).is_dir():
        return Side(against, Path(against).resolve(), provider), this
    unpack(against, scratch)
    return Side(against, scratch, provider), this


def unpack(revision: str, folder: Path) -> None:
    """The packages as they were at `revision`."""
    git = ["git", "-C", str(INSTALLED)]
    listed = subprocess.run(
        [*git, "ls-tree", "--name-only", "--end-of-options", revision], capture_output=True, text=True
    )
    if listed.returncode:
        raise ValueError(
            f"--against {revision}: neither FILE.py:Name, nor a folder that holds {PACKAGES[1]}, nor a commit here: "
            + listed.stderr.strip()
        )
    there = [name for name in (*PACKAGES, SOURCES) if name in listed.stdout.split()]
    done = subprocess.run([*git, "archive", revision, "--", *there], capture_output=True, check=True)
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")


def _absolute(spec: str) -> str:
    place, _, name = spec.rpartition(":")
    return f"{Path(place).resolve()}:{name}"


class Process:
    """A worker on the packages of one side, with this harness. Starting it does not wait for it."""

    def __init__(self, side: Side, folder: Path):
        folder.mkdir()
        for name in (*PACKAGES, SOURCES):
            if (side.packages / name).exists():
                (folder / name).symlink_to(side.packages / name)
        (folder / HERE.name).symlink_to(HERE)
        command = [sys.executable, "-m", f"{HERE.name}.worker"]
        self.name, self.process = side.name, subprocess.Popen(
            command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )  # fmt: skip

    def ask(self, question: dict) -> float:
        """Raises RuntimeError, with the side's name, where the worker has died or could not do it."""
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.process.wait()  # it has let go of its pipe: it ends
            raise RuntimeError(f"{self.name}: its process died (exit code {self.process.returncode})")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{self.name}: {answer['error']}")
        return answer["seconds"]

    def close(self) -> None:
        with suppress(BrokenPipeError):  # what it was told last it has not read
            self.process.stdin.close()
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:  # it hangs in a call
            self.process.kill()
            self.process.wait()

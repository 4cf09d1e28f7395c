"""What is known of the films in a folder: which story each tells, and whether it is whole. One record for each, beside
the states, in the folder's `.memflow`; a name alone proves nothing."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from memflow.errors import MemFlowError
from memflow.files import claim, write_whole
from memflow.output.video import VideoWriter

FOLDER = ".memflow"
_ID = re.compile("[0-9a-f]{32}")
_FILM = {"frames", "checksum", "bytes", "fps"}  # what is known of a whole one
_PATIENCE = 15.0  # seconds that a film may still be held by a worker that is ending


@dataclass(frozen=True)
class Task:
    """A film to make.

    Attributes:
        film: its file.
        told: all that decides what the film shows, as JSON has it: prompts, seed, model and so on.
        overwrite: replace what does not belong to this story.
    """

    film: Path
    told: dict
    overwrite: bool = False

    @property
    def id(self) -> str:
        """Of the story and its settings: equal where they are equal."""
        return hashlib.sha256(json.dumps(self.told, sort_keys=True).encode()).hexdigest()[:32]

    @property
    def name(self) -> str:
        return self.film.stem

    @property
    def record(self) -> Path:
        return self.film.parent / FOLDER / f"{self.name}.json"

    @property
    def state(self) -> Path:
        return self.film.parent / FOLDER / f"{self.id}.safetensors"


def is_done(task: Task) -> bool:
    """Whether the film is there, whole, and tells this story.

    Raises:
        MemFlowError: what is there belongs to something else, and may not be overwritten.
    """
    if not task.film.exists() or not task.film.stat().st_size:  # never made, or thrown away
        return False
    known, refused = _read(task.record), None
    if known is None:
        refused = "is there, and no record says what it tells; --overwrite replaces it"
    elif known["id"] != task.id:
        names = sorted({*known["told"], *task.told})
        differing = ", ".join(name for name in names if known["told"].get(name) != task.told.get(name))
        done = "made" if known["film"] else "begun"
        refused = f"was {done} with other settings, it differs in {differing}; --overwrite tells it anew"
    elif known["film"] is not None:
        if _is_whole(task.film, **known["film"]):
            return True
        refused = "is not the film that was made of this story; --overwrite tells it anew"
    if refused and not task.overwrite:
        raise MemFlowError(f"{task.film}: {refused}")
    return False


def begin(task: Task) -> None:
    """Write down that this story is being told; states of what was there before are thrown away."""
    known = _read(task.record)
    if known is not None and known["id"] != task.id:
        (task.record.parent / f"{known['id']}.safetensors").unlink(missing_ok=True)
    _write(task, None)


def finish(task: Task, video: VideoWriter) -> None:
    """Write down that the film is whole; its state is not needed any more."""
    sync(task.film)
    size = task.film.stat().st_size
    _write(task, {"frames": video.frames, "checksum": video.checksum, "bytes": size, "fps": float(video.fps)})
    task.state.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Let what was written to a file survive a loss of power, before something relies on it."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


@contextmanager
def claimed(task: Task) -> Iterator[None]:
    """Hold the film: whoever else wants to make it, on any machine that shares the folder, waits or is refused. A
    process that dies lets go.

    Raises:
        MemFlowError: another process holds it, or it cannot be written.
    """
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            file = open(task.film, "ab")  # noqa: SIM115 (closed below)
        except OSError as error:
            raise MemFlowError(f"{task.film}: cannot be written: {error.strerror}") from None
        with file:
            if claim(file) and _is_still(file, task.film):
                try:
                    yield
                finally:
                    if _is_still(file, task.film) and not task.film.stat().st_size:
                        task.film.unlink()
                return
        if time.monotonic() > deadline:
            raise MemFlowError(f"{task.film}: another run is making it")
        time.sleep(0.1)


def _is_still(file, path: Path) -> bool:
    """Whether the open file is the one at `path`: who held it before may have removed it."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _is_whole(path: Path, frames: int, checksum: int, bytes: int, fps: float) -> bool:
    try:
        VideoWriter.resume(path, fps, frames, checksum)
    except (ValueError, TypeError, OverflowError):  # MemFlowError is one; numbers that are none
        return False
    return path.stat().st_size == bytes


def _read(record: Path) -> dict | None:
    """None where there is no record, or what is there is none."""
    try:
        known = json.loads(record.read_bytes())
        film = known["film"]
        whole = _ID.fullmatch(known["id"]) and isinstance(known["told"], dict)  # the id becomes the name of a file
        return known if whole and (film is None or film.keys() == _FILM) else None
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return None


def _write(task: Task, film: dict | None) -> None:
    text = json.dumps({"id": task.id, "told": task.told, "film": film}, indent=1)
    try:
        write_whole(task.record, lambda file: file.write(text.encode()))
    except OSError as error:
        raise MemFlowError(f"{task.record}: cannot be written: {error.strerror}") from None

"""A story on disk while it is told: the film, and a journal with a line for every chunk; and what of it is sent."""

from __future__ import annotations

import base64
import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from memflow.errors import MemFlowError
from memflow.files import claim
from memflow.output import jpeg
from memflow.output.video import VideoWriter
from memflow.tellers.teller import Turn

_THUMBNAIL = (128, 128)  # pixels at most
# What a journal must hold, in its first line and in others.
_ABOUT = {"fps": (int, float), "width": int, "height": int, "frames_per_chunk": int}
_CHUNK = {"chunk": int, "start_frame": int, "frames": int, "prompt": str, "switched": bool}
_SUFFIXES = (".mp4", ".jsonl", ".safetensors")


class Part(NamedTuple):
    """One binary message: its bytes, how many video frames are in them, and what is said of them."""

    data: bytes
    frames: int
    about: dict[str, Any]


class Film:
    """One story's files, held by this process alone while it is told.

    Args:
        folder: where they are.
        id: of the story.
        about: the first line of the journal, for a new story; None: the files are there.

    Attributes:
        about: the first line of the journal: fps, width, height, frames_per_chunk (latent), model, began.
        scenes: prompt, start_frame and chunk of every scene.
        chunks: that it has.
        video: the writer.

    Raises:
        OSError: the files cannot be made or are not there; BlockingIOError: somebody else holds them.
    """

    def __init__(self, folder: Path, id: str, about: dict[str, Any] | None = None):
        self.id, self.path, self._journal_path = id, folder / f"{id}.mp4", folder / f"{id}.jsonl"
        self.chunks, self.scenes, self._said_header = 0, [], False
        self.video: VideoWriter | None = None
        self._journal = open(self._journal_path, "r+b" if about is None else "x+b")  # noqa: SIM115 (close() closes it)
        try:
            if not claim(self._journal):
                raise BlockingIOError
            if about is not None:
                self._write(about)
            self.about, self._entries = read_journal(self._journal_path)
        except BaseException:
            self.close()
            if about is not None:
                self._journal_path.unlink(missing_ok=True)
            raise

    def begin(self) -> None:
        """Start the film: its first chunk is the next to be added."""
        self.video = VideoWriter(self.path, self.about["fps"])

    def resume(self, chunks: int, frames: int, checksum: int) -> None:
        """Go on after so many chunks, and frames with that checksum, as a state knows them; what came after is made
        again. MemFlowError where film or journal are not what was written."""
        if len(self._entries) < chunks:
            raise MemFlowError(f"story {self.id}: its journal has {len(self._entries)} of {chunks} chunks")
        if frames:
            self.video = VideoWriter.resume(self.path, self.about["fps"], frames, checksum)
        else:  # the viewer was gone before the first chunk
            self.begin()
        self._journal.seek(0)
        self._journal.truncate(sum(len(line) for line, _ in zip(self._journal, range(chunks + 1), strict=False)))
        self._journal.seek(0, os.SEEK_END)
        self.chunks, self.scenes = chunks, scenes_of(self._entries[:chunks])
        self._entries = []

    def add(self, turn: Turn, format: str, report: bool, generate_ms: float) -> list[Part]:
        """Write a chunk.

        Args:
            turn: with the chunk and what the memory held.
            format: "m4s" or "jpeg".
            report: whether the memory is told.
            generate_ms: what it took to make.

        Returns:
            What is to be sent.

        Raises:
            MemFlowError: the disk is full or the like.
        """
        chunk, start, began = turn.chunk, self.video.frames, time.perf_counter()
        frames = chunk.frames[0].numpy()
        data = self.video.write(frames)
        images = [jpeg(frame, 80) for frame in frames] if format == "jpeg" else []
        about: dict[str, Any] = {"chunk": chunk.index, "start_frame": start, "frames": len(frames)}
        about |= {"prompt": chunk.prompts[0], "switched": chunk.switched, "dropped_event_ids": list(turn.dropped)}
        about["generate_ms"] = round(generate_ms, 1)
        if report:
            about["memory"] = memory_of(turn.snapshot, self.about["frames_per_chunk"])
            picture = base64.b64encode(jpeg(frames[0], 70, _THUMBNAIL)).decode()
            about["thumbnail"] = f"data:image/jpeg;base64,{picture}"
        about["encode_ms"] = round((time.perf_counter() - began) * 1e3, 1)
        try:
            self._write(about)
        except OSError as error:
            raise MemFlowError(f"story {self.id}: {error.strerror}") from None
        self.chunks += 1
        if chunk.switched:
            self.scenes.append({"prompt": about["prompt"], "start_frame": start, "chunk": chunk.index})
        if format == "jpeg":
            rest = {name: value for name, value in about.items() if name not in ("memory", "thumbnail")}
            return [
                Part(image, 1, (rest if at else about) | {"mime": "image/jpeg", "start_frame": start + at, "frames": 1})
                for at, image in enumerate(images)
            ]
        header, self._said_header = b"" if self._said_header else self.video.header, True
        mime = f'video/mp4; codecs="{self.video.codec}"'
        return [Part(header + data, len(frames), about | {"mime": mime})]

    def close(self) -> None:
        """Let the files go. What a full disk did not take was said when it was written, and is tried again here."""
        for file in (self._journal, self.video):
            if file is not None:
                with suppress(OSError):
                    file.close()

    def _write(self, line: dict[str, Any]) -> None:
        self._journal.write(json.dumps(line).encode() + b"\n")
        self._journal.flush()


def is_full(said: str) -> bool:
    """Whether an error says that there is no room: of the system, of the user's quota, or left to this server."""
    return any(words in said for words in ("No space left", "quota exceeded", "disk space"))


def read_journal(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The first line of a journal, and its chunks up to a line that is cut off or damaged. OSError if there is none."""
    lines: list[dict[str, Any]] = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            break
        needed = _CHUNK if lines else _ABOUT
        if not isinstance(entry, dict) or not all(isinstance(entry.get(name), needed[name]) for name in needed):
            break
        lines.append(entry)
    if not lines:
        raise FileNotFoundError(2, "its journal is empty", str(path))
    return lines[0], lines[1:]


def scenes_of(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Prompt, start_frame and chunk of every scene, from the chunks of a journal."""
    names = ("prompt", "start_frame", "chunk")
    return [{name: entry[name] for name in names} for entry in entries if entry["switched"]]


def files_of(folder: Path) -> Iterator[tuple[str, list[Path]]]:
    """Id and files of the stories in a folder."""
    found: dict[str, list[Path]] = {}
    for path in folder.iterdir():
        if path.suffix in _SUFFIXES and not path.name.startswith("."):
            found.setdefault(path.stem, []).append(path)
    yield from found.items()


def remove(folder: Path, id: str) -> bool:
    """Remove a story's files; False if a process tells it."""
    journal = folder / f"{id}.jsonl"
    with ExitStack() as stack:
        try:
            if not claim(stack.enter_context(open(journal, "r+b"))):
                return False
        except FileNotFoundError:  # only pieces are left, or somebody else removes it too
            pass
        for suffix in _SUFFIXES:  # while nobody can begin to go on with it
            (folder / f"{id}{suffix}").unlink(missing_ok=True)
    return True


def memory_of(snapshot, frames_per_chunk: int) -> dict[str, Any]:
    """What a memory held: each past frame, the shares of the layers that hold and show it, its relevance, and the words
    that called for it, where the memory can say so."""
    words = (getattr(snapshot, "words", None) or [{}])[0]
    held, relevance, shown = snapshot.held[:, 0], snapshot.relevance[:, 0], snapshot.recalled[:, 0]
    frames = []
    for frame in np.unique(held[held >= 0]):
        here, worth = held == frame, None
        # What has just come has none yet, and JSON has no infinity.
        if (known := relevance[here][np.isfinite(relevance[here])]).size:
            worth = round(float(np.mean(known, dtype=np.float64)), 4)
        frames.append(
            {
                "frame": int(frame),
                "chunk": int(frame) // frames_per_chunk,
                "held": round(float(here.any(1).mean()), 3),
                "shown": round(float((shown == frame).any(1).mean()), 3),
                "relevance": worth,
                "words": words.get(int(frame), []),
            }
        )
    return {"held": frames, "sink": [int(n) for n in snapshot.sink], "window": [int(n) for n in snapshot.window]}

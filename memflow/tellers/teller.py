"""`Teller`: one model, and the stories that it tells by turns, a chunk at a time. Servers and workers stand on it."""

from __future__ import annotations

import gc
import re
import threading
import traceback
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from memflow.errors import MemFlowError, OutOfMemory
from memflow.stream.plan import prompt_texts

if TYPE_CHECKING:
    from memflow.memory.views import MemorySnapshot
    from memflow.stream.pipeline import MemFlowPipeline
    from memflow.stream.stream import Chunk, Stream

_ID = re.compile(r"[A-Za-z0-9_-]{1,80}")
_OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)


class Turn(NamedTuple):
    """What one turn gave.

    Attributes:
        id: of the story.
        chunk: that was made; None: the story has left the teller, nothing more comes of it.
        snapshot: what the memory held for it, [layers, B, n] frame numbers and relevance; None if not asked for.
        started: the tag of the prompt that begins with this chunk; None: none that was sent does.
        dropped: tags of prompts in whose place a later one came before they had begun.
        error: why the story ended; None: it has been told to its end.
    """

    id: str
    chunk: Chunk | None = None
    snapshot: MemorySnapshot | None = None
    started: str | None = None
    dropped: tuple[str, ...] = ()
    error: Exception | None = None


@dataclass
class _Story:
    stream: Stream
    stop: int | None
    paused: bool = False
    served: int = 0  # number of its last turn
    busy: threading.Lock = field(default_factory=threading.Lock)  # a chunk is being made, or a state written
    sent: list[tuple[str, str | None]] = field(default_factory=list)  # (prompt, tag) for the next turn


class Teller:
    """One model, and the stories it tells by turns.

    `turn` makes one chunk, of the story that has waited longest. One thread calls it (and `begin` and `resume`, which
    use the model too); the other methods may be called from any. What fails ends one story and not the teller. Of a
    story that is not being told `stream`, `send`, `pause` and `save` raise a MemFlowError.

    Args:
        pipeline: the model, a `MemFlowPipeline`.
        folder: where states are kept, one file `ID.safetensors` for each; None: nothing can be saved or resumed.
        snapshots: whether turns tell what the memory held.

    Example:
        >>> from memflow import MemFlowPipeline
        >>> teller = Teller(MemFlowPipeline.from_preset("storybook"))
        >>> first = teller.begin(["bo, a red ball, jumps on the beach."], seconds_per_prompt=0.75)
        >>> second = teller.begin(["mia, a white star, waits in the forest."], seconds_per_prompt=0.375)
        >>> turns = [teller.turn() for _ in range(5)]
        >>> [("first" if turn.id == first else "second", turn.chunk is not None) for turn in turns]
        [('first', True), ('second', True), ('first', True), ('second', False), ('first', False)]
        >>> teller.turn() is None
        True
    """

    def __init__(self, pipeline: MemFlowPipeline, folder: str | Path | None = None, *, snapshots: bool = False):
        self.pipeline, self.snapshots = pipeline, snapshots
        self.folder = None if folder is None else Path(folder)
        self._stories: dict[str, _Story] = {}
        self._lock, self._turns = threading.Lock(), 0

    def __contains__(self, id: str) -> bool:
        return id in self._stories

    def __len__(self) -> int:
        """Stories that are being told."""
        return len(self._stories)

    @property
    def waiting(self) -> int:
        """Stories that a turn could be of."""
        with self._lock:
            return sum(not story.paused for story in self._stories.values())

    def begin(self, prompts: list[str], *, id: str | None = None, stop: int | None = None, **settings) -> str:
        """Begin a story; its first turn comes before those of the others.

        Args:
            prompts: one text per prompt.
            id: letters, digits, hyphens and underscores, at most 80; a random one where not given.
            stop: chunks after which the story ends, whatever is still planned; None: when nothing is planned any more.
            settings: of `MemFlowPipeline.stream`.

        Returns:
            Its id.

        Raises:
            MemFlowError: what cannot be told, an id that is no id or is in use, or not enough memory.
        """
        id = uuid.uuid4().hex if id is None else id
        return self._enter(id, stop, lambda: self.pipeline.stream(prompts, **settings))

    def resume(self, id: str, *, stop: int | None = None) -> str:
        """Go on with a story from the state in the folder.

        Args:
            id: under which it was saved.
            stop: chunks, counted from the story's beginning, after which it ends; None: as planned.

        Returns:
            The id.

        Raises:
            MemFlowError: there is no such state, another model made it, the id is in use, or not enough memory.
        """
        return self._enter(id, stop, lambda: self.pipeline.resume(self.path(id)))

    def path(self, id: str) -> Path:
        """The file of a story's state, told or not; MemFlowError where `id` is no id, or there is no folder."""
        check_id(id)
        if self.folder is None:
            raise MemFlowError("this teller has no folder, so that no story can be saved or resumed")
        return self.folder / f"{id}.safetensors"

    def stream(self, id: str) -> Stream:
        """The stream of a story, to be read from; `send` and `save` are the teller's."""
        return self._story(id).stream

    def send(self, id: str, prompt: str, tag: str | None = None) -> None:
        """Let a story go on under another prompt from its next turn on. Of several sent until then the last counts; its
        `tag` comes back in the `Turn` that it begins with. MemFlowError for what is no prompt."""
        prompt_texts(prompt, 1)
        story = self._story(id)
        with self._lock:
            story.sent.append((prompt, tag))

    def pause(self, id: str, paused: bool = True) -> None:
        """Leave a story out of the turns, or (False) take it in again."""
        self._story(id).paused = paused

    def turn(self) -> Turn | None:
        """Make one chunk, of the story whose last turn is longest ago.

        Returns:
            What came of it; None: there is no story, or all are paused.
        """
        with self._lock:
            ready = [(story.served, id) for id, story in self._stories.items() if not story.paused]
            if not ready:
                return None
            id = min(ready, key=lambda pair: pair[0])[1]
            story = self._stories[id]
            self._turns += 1
            story.served = self._turns
        try:
            return self._told(id, story)
        except Exception as error:
            self.end(id)
            del story  # with its memory, before others need some
            return Turn(id, error=_plain(error, len(self)))

    def save(self, id: str, extra: dict[str, str] | None = None) -> Path:
        """Write a story's state to the folder; it goes on. Waits for the chunk that is being made.

        Args:
            id: of the story.
            extra: texts of the caller's own that come back as `stream(id).extra`.

        Returns:
            The file; MemFlowError where it cannot be written.
        """
        path, story = self.path(id), self._story(id)
        with story.busy:
            with self._lock:  # what waits is in the state; its next turn sends it again, for the tag, to the same end
                self._hand_over(story)
            story.stream.save(path, extra)
        return path

    def end(self, id: str) -> None:
        """Let a story go, and what it remembers; a state that was saved stays. No error where it is not being told."""
        with self._lock:
            self._stories.pop(id, None)

    def _enter(self, id: str, stop: int | None, make) -> str:
        check_id(id)
        if id in self._stories:
            raise MemFlowError(f"story {id} is being told already")
        try:
            stream = make()
        except Exception as error:
            raise _plain(error, len(self)) from None
        with self._lock:
            self._stories[id] = _Story(stream, stop)
        return id

    def _told(self, id: str, story: _Story) -> Turn:
        stream = story.stream
        if story.stop is not None and stream.position >= story.stop:
            self.end(id)
            return Turn(id)
        with story.busy:
            with self._lock:
                sent = self._hand_over(story)
                story.sent = []
            chunk = next(stream, None)
        if chunk is None:
            self.end(id)
            return Turn(id)
        snapshot = stream.snapshot() if self.snapshots else None
        dropped = tuple(tag for _, tag in sent[:-1] if tag is not None)
        return Turn(id, chunk, snapshot, sent[-1][1] if sent else None, dropped)

    @staticmethod
    def _hand_over(story: _Story) -> list[tuple[str, str | None]]:
        for prompt, _ in story.sent[-1:]:
            story.stream.send(prompt)
        return story.sent

    def _story(self, id: str) -> _Story:
        story = self._stories.get(id)
        if story is None:
            raise MemFlowError(f"story {id} is not being told")
        return story


def check_id(id: str) -> None:
    """Raise MemFlowError unless `id` can be a story's: it becomes the name of a file."""
    if not isinstance(id, str) or not _ID.fullmatch(id):
        raise MemFlowError("id must be 1 to 80 letters, digits, hyphens and underscores")


def _plain(error: Exception, others: int) -> Exception:
    """`error` without what it holds on to; out of memory, in words, and with all freed that can be."""
    link: BaseException | None = error
    while link is not None:
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__
    # torch has no class of its own for it where the memory is the host's.
    if not isinstance(error, _OUT_OF_MEMORY) and "can't allocate memory" not in str(error):
        return error
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return OutOfMemory(f"out of memory for this story; {others} others are being told, a smaller picture needs less")

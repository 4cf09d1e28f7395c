"""One story while it is told to one viewer: paced by the viewer, filmed, saved when the viewer leaves."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

from memflow.errors import MemFlowError

if TYPE_CHECKING:
    from memflow.serve.film import Film, Part
    from memflow.serve.protocol import Start
    from memflow.serve.stories import Stories
    from memflow.tellers.teller import Turn

_AHEAD = 2  # chunks of one story that are made and not yet sent


class Telling:
    """A story, its viewer and its film.

    Args:
        stories: of the server.
        film: begun, or ready to go on.
        start: what the viewer asked for.
        stop: chunks after which it ends.

    Attributes:
        id: of the story.
        film: its files.
        parts: lists of what is to be sent, in order; None: nothing more comes. `sent` says that one is on its way.
        error: why nothing more comes; None: told to its end, or to `stop`.
        taken: another viewer goes on with the story.
    """

    def __init__(self, stories: Stories, film: Film, start: Start, stop: int):
        self.stories, self.film, self.id, self.stop = stories, film, film.id, stop
        self.format, self.report, self.buffer = start.format, start.report, start.buffer
        self.fps = film.about["fps"]
        self.made = film.video.frames
        self.playhead = self.made / self.fps
        self.chunks = film.chunks
        self.parts: asyncio.Queue[list[Part] | None] = asyncio.Queue()
        self.started: dict[int, str] = {}  # chunk -> event that begins with it
        self.error: Exception | None = None
        self.over = self.paused = False
        self.taken = False  # by another viewer
        self._holds = self._unsent = 0
        self._turns: asyncio.Queue[tuple[Turn, float]] = asyncio.Queue()
        self._filming = asyncio.create_task(self._film())
        self._leaving: asyncio.Task | None = None
        self._saving: asyncio.Task | None = None

    def pace(self) -> None:
        """Let the teller tell on, or wait: for the viewer, for what is not sent yet, for a state to be written."""
        if self.over:
            return
        ahead = self.buffer is not None and self.made / self.fps - self.playhead > self.buffer
        wait = self.paused or ahead or self._holds > 0 or self._unsent >= _AHEAD
        with suppress(MemFlowError):
            self.stories.teller.pause(self.id, wait)
        if not wait:
            self.stories.awake.set()

    def played(self, seconds: float) -> None:
        """The viewer has seen the film up to `seconds`."""
        self.playhead = max(self.playhead, min(seconds, self.made / self.fps))
        self.pace()

    def pause(self, paused: bool) -> None:
        """The viewer wants no more for now, or does again."""
        self.paused = paused
        self.pace()

    def sent(self) -> None:
        """What was last taken from `parts` is on its way."""
        self._unsent -= 1
        self.pace()

    def took(self, turn: Turn, seconds: float) -> None:
        """A turn of this story has ended."""
        if turn.chunk is None:
            self.over, self.error = True, turn.error
        else:
            self.made += turn.chunk.frames.shape[1]
            self.chunks += 1
            self._unsent += 1
            if turn.started is not None:
                self.started[turn.chunk.index] = turn.started
        self._turns.put_nowait((turn, seconds))
        self.pace()
        every = self.stories.settings.save_every
        if every and turn.chunk is not None and self.chunks % every == 0:
            self._saving = asyncio.create_task(self._save_quietly())

    async def save(self) -> None:
        """Write the state, as it is when all that has been made is filmed; the story goes on.

        Raises:
            MemFlowError: it is over, or the disk is full or the like.
        """
        self._holds += 1
        self.pace()
        try:
            await self.stories.model(lambda: None)  # the turn that is being made ends
            await self._turns.join()
            if self.over:
                raise MemFlowError("the story is over")
            extra = self.stories.extra | {"name": self.id, "stop": str(self.stop)} | self.film.video.mark
            await self.stories.model(self.stories.teller.save, self.id, extra)
            self.stories.metrics.saved += 1
        finally:
            self._holds -= 1
            self.pace()

    async def leave(self) -> None:
        """The viewer is gone: save, and let the story go. Ends what has begun even if the caller is cancelled."""
        if self._leaving is None:
            self._leaving = asyncio.create_task(self._leave())
        await asyncio.shield(self._leaving)

    async def _leave(self) -> None:
        self._holds += 1  # for good
        try:
            if self._saving is not None:
                await self._saving
            if not self.over:
                await self.save()
            elif self.error is None:  # told to its end
                self.stories.teller.path(self.id).unlink(missing_ok=True)
        except Exception as error:
            self.error = self.error or error
        finally:
            self.over = True
            self.stories.teller.end(self.id)
            await self._turns.join()
            self._filming.cancel()
            await self.stories.films(self.film.close)
            self.stories.tellings.pop(self.id, None)
            self.parts.put_nowait(None)

    async def _save_quietly(self) -> None:
        with suppress(MemFlowError):  # the next one, or the one at the end, says so
            await self.save()

    async def _film(self) -> None:
        broken = False
        while True:
            turn, seconds = await self._turns.get()
            try:
                if turn.chunk is not None and not broken:
                    add = self.film.add
                    parts = await self.stories.films(add, turn, self.format, self.report, seconds * 1e3)
                    self.parts.put_nowait(parts)
            except Exception as error:  # a full disk, for one; the story ends, and its last state counts
                self.over, self.error, broken = True, error, True
                self.stories.teller.end(self.id)
            finally:
                self._turns.task_done()
            if self.over and self._turns.empty():
                self.parts.put_nowait(None)

"""The stories of a server: one thread tells them by turns, others film them; they are begun, resumed and tidied up."""

from __future__ import annotations

import asyncio
import math
import shutil
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memflow.errors import MemFlowError, OutOfMemory
from memflow.models.wan.text import unread
from memflow.output.video import marked
from memflow.serve.film import Film, files_of, is_full, read_journal, remove, scenes_of
from memflow.serve.metrics import Metrics
from memflow.serve.protocol import Refused, Start
from memflow.serve.settings import Settings
from memflow.serve.telling import Telling
from memflow.stream.saved import read_header
from memflow.tellers.teller import Teller, Turn, check_id

if TYPE_CHECKING:
    from memflow.memory.config import MemoryConfig
    from memflow.stream.pipeline import MemFlowPipeline

_LOCKED = 5.0  # seconds that another server has for saving
_TIDY = 60.0  # seconds between two looks at the folder


def memory_asked_for(trained: MemoryConfig, asked: dict[str, Any]) -> MemoryConfig:
    """The model's memory with what a viewer asked for; another policy than that of a published pipeline comes without
    its other rules. MemFlowError for settings that do not go together."""
    other = asked.get("policy", trained.policy) != trained.policy
    # How many frames the model's own policy holds suits no other.
    ours = {"published_mode": None, "global_sink": True, "held_frames": None} if other else {}
    try:
        return trained.changed(**ours | asked)
    except ValueError as error:
        raise MemFlowError(f"memory: {error}") from None


class Stories:
    """All stories that a server tells or keeps.

    Args:
        pipeline: the model.
        settings: what is allowed. The folder is made.
        extra: texts that go into every state: what `memflow generate --resume` must know of the model.
    """

    def __init__(self, pipeline: MemFlowPipeline, settings: Settings, extra: dict[str, str]):
        self.pipeline, self.settings, self.extra = pipeline, settings, extra
        settings.folder.mkdir(parents=True, exist_ok=True)
        self.teller = Teller(pipeline, settings.folder, snapshots=True)
        self.tellings: dict[str, Telling] = {}
        self.metrics = Metrics()
        self.awake = asyncio.Event()
        self.disk = 0
        self.coming = 0  # sessions that are being prepared
        self.stopping = False
        self._threads = ThreadPoolExecutor(1, "model"), ThreadPoolExecutor(2, "films")
        self._tasks: list[asyncio.Task] = []

    async def __aenter__(self) -> Stories:
        await self._tidy_once()
        self._tasks = [asyncio.create_task(self._tell()), asyncio.create_task(self._tidy())]
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.stop()
        for task in self._tasks:
            task.cancel()
        for pool in self._threads:
            pool.shutdown()

    async def stop(self) -> None:
        """Begin no further story; those that are told are saved, and end."""
        self.stopping = True
        await asyncio.gather(*(telling.leave() for telling in list(self.tellings.values())))

    async def model(self, function: Callable, *arguments: Any) -> Any:
        """Call in the one thread that uses the model."""
        return await asyncio.get_running_loop().run_in_executor(self._threads[0], function, *arguments)

    async def films(self, function: Callable, *arguments: Any) -> Any:
        """Call in a thread that encodes, reads and writes."""
        return await asyncio.get_running_loop().run_in_executor(self._threads[1], function, *arguments)

    @property
    def status(self) -> str:
        """ "ok", "stopping", or "failed": a defect has ended what tells the stories."""
        if self.stopping:
            return "stopping"
        return "failed" if any(task.done() for task in self._tasks) else "ok"

    async def lost(self, prompt: str) -> dict[str, Any]:
        """The words of `prompt` that the model does not know, and its end where that is cut off (None: it is not); told
        without waiting for the model."""
        pipe = self.pipeline
        cut, unknown = await asyncio.to_thread(unread, pipe.tokenizer, prompt, pipe.config.text_length)
        return {"unknown": unknown, "cut": cut}

    async def open(self, start: Start) -> Telling:
        """Begin or resume the story that a viewer asks for.

        Raises:
            Refused: code "busy", "not_found", "disk_full", "out_of_memory", "failed" or "bad_start".
        """
        full = len(self.tellings) + self.coming >= self.settings.sessions and start.resume not in self.tellings
        if full or self.stopping:
            raise Refused(f"{self.settings.sessions} stories are being told already; try again later", "busy")
        if self.disk > self.settings.disk_bytes:
            raise Refused("the disk space of this server is used up", "disk_full")
        self.coming += 1
        try:
            telling = await (self._begin(start) if start.resume is None else self._resume(start))
        except MemFlowError as error:
            code = "out_of_memory" if isinstance(error, OutOfMemory) else "bad_start"
            raise Refused(self.said(error), code) from None
        except OSError as error:
            said = f"the folder of this server cannot be written: {error.strerror}"
            raise Refused(said, "disk_full" if is_full(said) else "failed") from None
        finally:
            self.coming -= 1
        self.tellings[telling.id] = telling
        if self.stopping:  # since it was asked for: `stop` has not seen it
            await telling.leave()
        telling.pace()
        return telling

    def said(self, error: MemFlowError) -> str:
        """What a viewer is told of it: not where the server keeps its files."""
        return str(error).replace(f"{self.settings.folder}/", "")

    async def about(self, id: str) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
        """What is known of a story, and its chunks; None if it is not here."""
        try:
            check_id(id)
            about, entries = await self.films(read_journal, self.settings.folder / f"{id}.jsonl")
        except (MemFlowError, OSError):
            return None
        state = "telling" if id in self.tellings else "saved" if self.teller.path(id).exists() else "told"
        frames = sum(entry["frames"] for entry in entries)
        known = {"id": id, "state": state, "chunks": len(entries), "frames": frames, "seconds": frames / about["fps"]}
        known |= {name: about[name] for name in ("fps", "width", "height")}
        known |= {"scenes": scenes_of(entries), "film": f"/v1/stories/{id}.mp4"}
        return known | {"kept_until": None if state == "telling" else self.kept_until()}, entries

    def film(self, id: str) -> Path | None:
        """The film of a story; None if it is not here."""
        try:
            path = self.teller.path(id).with_suffix(".mp4")
        except MemFlowError:
            return None
        return path if path.exists() else None

    def kept_until(self) -> int:
        """Until when a story is kept that is saved now, in seconds since 1970."""
        return round(time.time() + self.settings.keep_seconds)

    async def _begin(self, start: Start) -> Telling:
        pipe, settings = self.pipeline, self.settings
        height, width = start.height or pipe.config.height, start.width or pipe.config.width
        most = pipe.config.height * pipe.config.width
        if height * width > most:
            raise MemFlowError(f"width x height: at most {most:,} pixels, {width} x {height} came")
        fps = start.fps or pipe.fps
        limit = settings.story_seconds * fps
        frames = limit if start.frames is None and start.seconds is None else start.frames or start.seconds * fps
        id, per_chunk = f"video_stream-{uuid.uuid4().hex}", pipe.frames_per_chunk
        stop = max(1, math.ceil(min(frames, limit) / per_chunk))
        memory = memory_asked_for(pipe.memory_config, start.memory)
        about = {"fps": fps, "width": width, "height": height, "frames_per_chunk": memory.frames_per_chunk}
        about |= {"model": settings.model, "began": round(time.time()), "memory": memory.to_dict()}
        seconds = stop * per_chunk / pipe.fps
        of_stream = {"seconds_per_prompt": seconds, "height": height, "width": width, "seed": start.seed}

        def begin() -> Film:
            film = Film(settings.folder, id, about)
            try:
                film.begin()
                self.teller.pause(self.teller.begin([start.prompt], id=id, stop=stop, memory=memory, **of_stream))
            except BaseException:
                film.close()
                remove(settings.folder, id)
                raise
            return film

        return Telling(self, await self.model(begin), start, stop)

    async def _resume(self, start: Start) -> Telling:
        id = start.resume
        film, path = await self._locked(id), self.teller.path(id)
        if film is None or not path.exists():
            if film is not None:
                film.close()
            raise Refused("there is no such story to go on with", "not_found")

        def resume() -> int:
            try:
                stop = int(read_header(path, digest=False)["extra"]["stop"])
                self.teller.pause(self.teller.resume(id, stop=stop))
                stream = self.teller.stream(id)
                film.resume(stream.position, *marked(stream.extra))
                if start.prompt is not None:
                    self.teller.send(id, start.prompt)
            except BaseException as error:
                self.teller.end(id)
                film.close()
                if isinstance(error, (KeyError, ValueError)) and not isinstance(error, MemFlowError):
                    raise MemFlowError(f"story {id}: no server saved it") from None
                raise
            return stop

        return Telling(self, film, start, await self.model(resume))

    async def _locked(self, id: str) -> Film | None:
        """The files of a story; whoever tells it gives it up, and another server has time to save what was left."""
        for wait in (*(_LOCKED / 10,) * 10, None):
            if (other := self.tellings.get(id)) is not None:  # a page that was loaded again, perhaps twice
                other.taken |= not other.over  # what is told already is only to be sent
                await other.leave()
            try:
                return await self.films(Film, self.settings.folder, id)
            except FileNotFoundError:
                return None
            except BlockingIOError:
                if wait is None:
                    raise Refused("another server tells this story", "busy") from None
                await asyncio.sleep(wait)

    async def _tell(self) -> None:
        """One turn after the other, for ever."""

        def turn() -> tuple[Turn | None, float]:
            began = time.perf_counter()
            return self.teller.turn(), time.perf_counter() - began

        while True:
            self.awake.clear()
            found, seconds = await self.model(turn)
            if found is None:
                await self.awake.wait()
                continue
            if found.chunk is not None:
                self.metrics.made(found.chunk.frames.shape[1], seconds)
            telling = self.tellings.get(found.id)
            if telling is not None:
                telling.took(found, seconds)

    async def _tidy(self) -> None:
        while True:
            await asyncio.sleep(_TIDY)
            with suppress(OSError):  # of a folder that is on its way back
                await self._tidy_once()

    async def _tidy_once(self) -> None:
        """Remove what has been kept long enough, and see how much there is; a full disk ends what is told."""
        self.disk = await self.films(self._swept)
        if self.disk > self.settings.disk_bytes or shutil.disk_usage(self.settings.folder).free < 2**28:
            for telling in self.tellings.values():
                telling.error = MemFlowError("the disk space of this server is used up")
            await asyncio.gather(*(telling.leave() for telling in list(self.tellings.values())))

    def _swept(self) -> int:
        total, oldest = 0, time.time() - self.settings.keep_seconds
        for id, paths in files_of(self.settings.folder):
            with suppress(OSError):
                stats = [path.stat() for path in paths]
                young = id in self.tellings or max(stat.st_mtime for stat in stats) > oldest
                if young or not remove(self.settings.folder, id):
                    total += sum(stat.st_size for stat in stats)
        return total

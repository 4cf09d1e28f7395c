"""One connection to `WS /v1/realtime/video`, from its first message to the code that it is closed with."""

from __future__ import annotations

import asyncio
import json
import time
from typing import TYPE_CHECKING, Any

from starlette.websockets import WebSocket, WebSocketDisconnect

from memflow.errors import MemFlowError, OutOfMemory
from memflow.serve import protocol
from memflow.serve.film import is_full
from memflow.serve.protocol import Refused

if TYPE_CHECKING:
    from memflow.serve.stories import Stories
    from memflow.serve.telling import Telling

_CODES = {"busy": 1013, "bad_start": 1008, "not_found": 1008, "failed": 1011, "out_of_memory": 1011, "disk_full": 1011}


class _Ended(Exception):
    """The connection is over: why, for the client (None: it is gone), and the code to close it with."""

    def __init__(self, message: dict[str, Any] | None, code: int = 1000):
        self.message, self.code = message, code


class Session:
    """A viewer.

    Args:
        socket: the connection, not accepted yet.
        stories: of the server.
    """

    def __init__(self, socket: WebSocket, stories: Stories):
        self.socket, self.stories, self.settings = socket, stories, stories.settings
        self.telling: Telling | None = None
        self.events: dict[str, None] = {}
        self.heard = time.monotonic()  # the last message, or chunk sent
        self.binaries, self.stopped = 0, False
        self._tokens, self._counted = 10 * self.settings.scenes_per_second, self.heard
        self._sending = asyncio.Lock()

    async def run(self) -> None:
        """Serve the connection to its end; the story is saved then."""
        await self.socket.accept()
        end = _Ended(None)
        try:
            await self._start()
            await self._until_one_ends(self._listen(), self._deliver(), self._watch())
        except _Ended as ended:
            end = ended
        except (WebSocketDisconnect, asyncio.TimeoutError, OSError):
            pass  # gone, or it does not read
        finally:
            if self.telling is not None:
                await self.telling.leave()
        await self._close(end)

    async def _start(self) -> None:
        try:
            text = await asyncio.wait_for(self._receive(), self.settings.start_seconds)
            start = protocol.start(protocol.read(text, self.settings, "session.start"), self.settings)
            self.telling = telling = await self.stories.open(start)
        except asyncio.TimeoutError:
            message = f"session.start did not come within {self.settings.start_seconds:g} s"
            raise self._ended(message, "bad_start") from None
        except Refused as refused:
            code = refused.code if refused.code in _CODES else "bad_start"
            raise self._ended(refused.message, code) from None
        about, pipe = telling.film.about, self.stories.pipeline
        ours = {name: about[name] for name in ("fps", "width", "height", "memory")}
        ours |= {"frames_per_chunk": pipe.frames_per_chunk, "latent_frames_per_chunk": about["frames_per_chunk"]}
        ours |= {"chunks": telling.film.chunks, "frames": telling.film.video.frames, "scenes": telling.film.scenes}
        ours |= {"film": f"/v1/stories/{telling.id}.mp4", "ignored": start.ignored}
        await self._say("video.start", format=start.format, config=start.config, memflow=ours)

    async def _until_one_ends(self, *parts: Any) -> None:
        tasks = [asyncio.create_task(part) for part in parts]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _listen(self) -> None:
        """Until session.stop."""
        spare, counted = self.settings.messages_per_second, time.monotonic()
        while not self.stopped:
            text = await self._receive()
            self.heard = now = time.monotonic()
            spare = min(spare + (now - counted) * self.settings.messages_per_second, self.settings.messages_per_second)
            counted, spare = now, spare - 1
            if spare < 0:  # what floods is read slowly
                await asyncio.sleep(-spare / self.settings.messages_per_second)
            try:
                message = protocol.read(text, self.settings)
                await self._follow(message)
            except Refused as refused:
                self.stories.metrics.errors[refused.code] += 1
                event = {} if refused.event_id is None else {"event_id": refused.event_id}
                await self._say("error", message=refused.message, code=refused.code, **event)

    async def _follow(self, message: dict[str, Any]) -> None:
        telling, kind = self.telling, message.get("type")
        if kind == "session.interaction":
            await self._interact(message)
        elif kind == "session.playback":
            telling.played(protocol.position(message))
        elif kind == "session.ping":
            await self._send({"type": "session.pong"})
        elif kind == "session.stop":
            self.stopped = True  # `_deliver` says so, after what has been made
            await telling.leave()
        elif kind == "session.pause":
            telling.pause(protocol.paused(message))
            await self._say("session.paused", paused=telling.paused)
        elif kind == "session.save":
            try:
                await telling.save()
            except MemFlowError as error:
                raise Refused(self.stories.said(error), "save_failed") from None
            seconds = telling.film.video.frames / telling.fps
            until = self.stories.kept_until()
            await self._say("session.saved", chunks=telling.film.chunks, seconds=seconds, kept_until=until)
        else:
            raise Refused(f"no such message: {str(kind)[:60]!r}")

    async def _interact(self, message: dict[str, Any]) -> None:
        event_id, prompt = protocol.interaction(message, self.settings)
        if event_id in self.events:
            raise Refused("this event_id has been used", "event_id_conflict", event_id)
        now, rate = time.monotonic(), self.settings.scenes_per_second
        self._tokens, self._counted = min(self._tokens + (now - self._counted) * rate, 10 * rate), now
        if self._tokens < 1 or len(self.events) >= self.settings.scenes:
            raise Refused("too many scenes at once; wait a little", "rate_limited", event_id)
        self._tokens -= 1
        self.events[event_id] = None
        lost = await self.stories.lost(prompt)
        try:
            self.stories.teller.send(self.telling.id, prompt, event_id)
        except MemFlowError as error:
            raise Refused(str(error), "interaction_failed", event_id) from None
        await self._say("session.interaction.queued", event_id=event_id, memflow=lost)

    async def _deliver(self) -> None:
        telling = self.telling
        while (parts := await telling.parts.get()) is not None:
            for part in parts:
                chunk = part.about["chunk"]
                event = telling.started.pop(chunk, None)
                events = [] if event is None else [event]  # a hard cut begins and ends with its chunk
                about = {"type": "video.chunk_metadata", "request_id": telling.id, "kind": "media"}
                about |= {"num_frames": part.frames, "byte_length": len(part.data), "generation_chunk_index": chunk}
                about |= {f"{name}_event_ids": events for name in ("started", "active", "completed")}
                about |= {"transport_chunk_index": self.binaries, "memflow": part.about}
                async with self._sending:  # nothing comes between a chunk and what is said of it
                    await self._timed(self.socket.send_text(json.dumps(about)))
                    await self._timed(self.socket.send_bytes(part.data))
                self.binaries += 1
                self.heard = time.monotonic()
            telling.sent()
        if telling.taken:
            raise self._ended("another connection goes on with this story", "taken_over", 1000)
        if telling.error is None and self.stories.stopping:
            raise _Ended(None, 1012)
        if self.stopped:
            raise _Ended(self._done("stopped"))
        if telling.error is None:
            limit = telling.film.video.frames >= self.settings.story_seconds * telling.fps
            raise _Ended(self._done("limit" if limit else "told"))
        text = self.stories.said(telling.error)
        short = isinstance(telling.error, OutOfMemory)
        kind = "out_of_memory" if short else "disk_full" if is_full(text) else "failed"
        plain = isinstance(telling.error, MemFlowError)
        raise self._ended(text if plain else f"the model failed: {type(telling.error).__name__}", kind)

    async def _watch(self) -> None:
        while (left := self.heard + self.settings.stall_seconds - time.monotonic()) > 0:
            await asyncio.sleep(left)
        raise self._ended("nothing was heard and nothing was made for too long; the story is saved", "stalled", 1000)

    async def _receive(self) -> str | None:
        """The text of the next message; None: it is binary."""
        message = await self.socket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1006))
        return message.get("text")

    async def _say(self, type: str, **fields: Any) -> None:
        known = {} if self.telling is None else {"request_id": self.telling.id}
        await self._send({"type": type} | known | fields)

    async def _send(self, message: dict[str, Any]) -> None:
        async with self._sending:
            await self._timed(self.socket.send_text(json.dumps(message)))

    async def _timed(self, sending: Any) -> None:
        await asyncio.wait_for(sending, self.settings.send_seconds)

    def _ended(self, message: str, code: str, close: int | None = None) -> _Ended:
        self.stories.metrics.errors[code] += 1
        known = {} if self.telling is None else {"request_id": self.telling.id}
        return _Ended(
            {"type": "error", "message": message, "code": code} | known, _CODES[code] if close is None else close
        )

    def _done(self, reason: str) -> dict[str, Any]:
        ours = {"reason": reason, "kept_until": self.stories.kept_until()}
        known = {"type": "session.done", "request_id": self.telling.id, "chunks": self.binaries}
        return known | {"stopped": reason == "stopped", "memflow": ours}

    async def _close(self, end: _Ended) -> None:
        try:
            if end.message is not None:
                await self._send(end.message)
            await self._timed(self.socket.close(end.code))
        except (WebSocketDisconnect, RuntimeError, asyncio.TimeoutError, OSError):
            pass  # it is gone already

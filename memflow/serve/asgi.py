"""The ASGI app: which address is answered by what."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.types import Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from memflow import __version__
from memflow.memory.policies import OFFERED
from memflow.serve import protocol
from memflow.serve.film import remove
from memflow.serve.session import Session
from memflow.serve.settings import Gate, Settings
from memflow.serve.stories import Stories

if TYPE_CHECKING:
    from memflow.stream.pipeline import MemFlowPipeline

PAGE = Path(__file__).parent / "page"
_BODY = 64 * 1024  # bytes of a request
_PATHSEND = "http.response.pathsend"
_EXAMPLES = {  # first scenes, by model
    "storybook": (
        "bo, a red ball, jumps on the beach.",
        "mia, a white star, waits in the forest.",
        "kip, a green box, walks left in the village.",
        "ada, a pink cone, jumps in the desert.",
    )
}


def make_app(load: Callable[[], tuple[MemFlowPipeline, dict[str, str]]], settings: Settings) -> Starlette:
    """A server for any ASGI host; also behind `memflow serve`.

    Args:
        load: gives the `MemFlowPipeline`, and texts for its states (see `Stories`); called when the server starts.
        settings: what is allowed.

    Returns:
        The app. Its lifespan loads the model, and saves every story at the end.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette):
        pipeline, extra = load()
        async with Stories(pipeline, settings, extra) as stories:
            app.state.stories = stories
            yield

    routes = [
        WebSocketRoute("/v1/realtime/video", _video),
        Route("/v1/info", _info),
        Route("/v1/check", _check, methods=["POST"]),
        Route("/v1/stories/{id}.mp4", _film),
        Route("/v1/stories/{id}", _story, methods=["GET", "DELETE"]),
        Route("/v1/stories/{id}/chunks", _chunks),
        Route("/health", _health),
        Route("/metrics", _metrics),
        Mount("/", StaticFiles(directory=PAGE, html=True, check_dir=False)),
    ]
    middleware = [Middleware(Gate, settings=settings)]
    if settings.origins:
        methods = ["GET", "POST", "DELETE"]
        headers = ["Authorization", "Content-Type", "Range"]
        cors = {"allow_origins": settings.origins, "allow_methods": methods, "allow_headers": headers}
        middleware.insert(0, Middleware(CORSMiddleware, **cors))
    return Starlette(routes=routes, middleware=middleware, lifespan=lifespan)


async def _video(socket: WebSocket) -> None:
    await Session(socket, socket.app.state.stories).run()


async def _info(request: Request) -> Response:
    stories: Stories = request.app.state.stories
    pipe, config = stories.pipeline, stories.pipeline.memory_config
    about = {"version": __version__, "model": stories.settings.model, "fps": pipe.fps}
    about |= {"width": pipe.config.width, "height": pipe.config.height, "frames_per_chunk": pipe.frames_per_chunk}
    about["examples"] = _EXAMPLES.get(stories.settings.model, ())
    about |= {"latent_frames_per_chunk": config.frames_per_chunk, "memory": config.to_dict()}
    about["policies"] = [{"name": name, "about": said} for name, said in OFFERED.items()]
    return JSONResponse(about | {"limits": stories.settings.public(), "sessions": len(stories.tellings)})


async def _check(request: Request) -> Response:
    stories: Stories = request.app.state.stories
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > _BODY:
            return PlainTextResponse("too long", 413)
    try:
        prompt = protocol.read(body.decode(), stories.settings, "request").get("prompt")
    except (UnicodeDecodeError, protocol.Refused) as error:
        return PlainTextResponse(str(error), 400)
    try:
        protocol.check_prompt(prompt, stories.settings)
    except protocol.Refused as refused:
        return JSONResponse({"error": refused.message, "unknown": [], "cut": None})
    return _json({"error": None} | await stories.lost(prompt))


async def _film(request: Request) -> Response:
    stories: Stories = request.app.state.stories
    path = stories.film(request.path_params["id"])
    if path is None:
        return _unknown()
    download = {"filename": "story.mp4"} if "download" in request.query_params else {}
    return _FilmSoFar(path, media_type="video/mp4", headers={"cache-control": "no-store"}, **download)


class _FilmSoFar(FileResponse):
    """A file that may grow while it is sent: no more of it than its length was when the answer began."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        left = -1  # bytes that are still to come; -1: not said yet

        async def send_at_most(message: Message) -> None:
            nonlocal left
            if message["type"] == "http.response.start":
                left = int(Headers(raw=message["headers"])["content-length"])
            elif left == 0:
                return  # this file has grown
            else:
                body = message.get("body", b"")[:left]
                left -= len(body)
                message = message | {"body": body, "more_body": message.get("more_body", False) and left > 0}
            await send(message)

        # A host that could send the file itself would send what it has grown to.
        kept = {name: value for name, value in scope.get("extensions", {}).items() if name != _PATHSEND}
        await super().__call__({**scope, "extensions": kept}, receive, send_at_most)


async def _story(request: Request) -> Response:
    stories: Stories = request.app.state.stories
    found = await stories.about(request.path_params["id"])
    if found is None:
        return _unknown()
    if request.method == "GET":
        return _json(found[0])
    if found[0]["state"] == "telling" or not await stories.films(remove, stories.settings.folder, found[0]["id"]):
        return PlainTextResponse("this story is being told; end it first", 409)
    return Response(status_code=204)


async def _chunks(request: Request) -> Response:
    found = await request.app.state.stories.about(request.path_params["id"])
    return _unknown() if found is None else _json({"chunks": found[1]})


async def _health(request: Request) -> Response:
    status = request.app.state.stories.status
    return JSONResponse({"status": status}, 200 if status == "ok" else 503)


async def _metrics(request: Request) -> Response:
    stories: Stories = request.app.state.stories
    text = stories.metrics.text(len(stories.tellings), stories.teller.waiting, stories.disk)
    return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


def _json(content: dict) -> Response:
    """Escaped: a prompt may hold what no UTF-8 can."""
    return Response(json.dumps(content), media_type="application/json", headers={"cache-control": "no-store"})


def _unknown() -> Response:
    return PlainTextResponse("there is no such story", 404)

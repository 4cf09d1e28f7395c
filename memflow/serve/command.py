"""`memflow serve`: from its options to a server that runs until it is stopped; and the same app for other hosts."""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import uvicorn
from starlette.applications import Starlette
from starlette.types import ASGIApp

from memflow.cli import Interrupt, loading
from memflow.cli.options import Dtype, Serving, with_whole_paths
from memflow.errors import MemFlowError, MemFlowWarning, install_command, shown
from memflow.files import cache_folder
from memflow.parallel import launched
from memflow.serve.asgi import make_app
from memflow.serve.settings import Settings

_MESSAGE = 256 * 1024  # bytes; `Settings.message_characters` count characters
_BUFFER = 256 * 1024  # bytes that the system holds for a reader: more would hide that it is slow
_NAME = "memflow"  # of the app in a cluster
_GRACE = 120  # seconds for saving when the server is stopped
_CHOICES: dict[str, dict[str, Any]] = {  # what the environment may say
    "dtype": {kind.value: kind for kind in Dtype},
    "prompt_cache": {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False},
}


def serve(request: Serving) -> int:
    """Serve until Ctrl-C or SIGTERM; every story is saved then. Returns 0, the exit code.

    Raises:
        MemFlowError: an address that cannot be had or must not be open, a model that cannot be loaded, or several
            processes of a launcher.
    """
    if launched():
        raise MemFlowError(
            "serve: not under torchrun (WORLD_SIZE is set), whose processes make one story; --ray serves from many GPUs"
        )
    settings = settings_of(request)
    listening = listen(request.host, request.port)
    if request.ray is not None:
        return _serve_cluster(request, settings, listening)
    with listening, ExitStack() as stack:
        loaded = _load(request, stack)
        _announce(settings.model, settings, *listening.getsockname()[:2])
        running = server(make_app(lambda: loaded, settings), settings)
        # uvicorn passes on what it was stopped with, when all is saved; the end of a terminal it does not know.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
            signal.signal(signal.SIGHUP, lambda *_: setattr(running, "should_exit", True))
        with suppress(KeyboardInterrupt):
            running.run(sockets=[listening])
    return 0


def _serve_cluster(request: Serving, settings: Settings, free: socket.socket) -> int:
    """`serve` from a Ray cluster, at an address that is free here."""
    from memflow.tellers.actors import cluster, share

    host, port = free.getsockname()[:2]
    free.close()
    replicas, said = request.replicas or 1, sys.stdout
    with cluster(request.ray) as resources, Interrupt() as interrupt:
        takes, _ = share(resources, request.device)
        make = partial(_app, with_whole_paths(request), settings)
        with deployed(make, replicas, settings, host=host, port=port, takes=takes):
            interrupt.notify = lambda: None
            _announce(f"{replicas} x {settings.model}", settings, host, port, said)
            while not interrupt.requested:
                time.sleep(0.2)
    return 0


@contextmanager
def deployed(
    make: Callable[[], ASGIApp], replicas: int, settings: Settings, *, host: str, port: int, takes: dict[str, float]
) -> Iterator[None]:
    """Serve an app from the cluster that this process is connected to; at the end of the block its stories are saved.

    Args:
        make: makes the app of a replica (`memflow.serve.asgi.make_app`), where it runs.
        replicas: how many.
        settings: what is allowed.
        host: where Ray's proxies listen, one on every machine that has a replica.
        port: of the proxies.
        takes: what a replica takes of the cluster, "num_gpus" for example.

    Raises:
        MemFlowError: Ray Serve is not installed, runs this app already, or the replicas cannot start.
    """
    try:
        from ray import serve as ray_serve
    except ModuleNotFoundError:
        raise MemFlowError(f"--ray needs Ray Serve: {install_command('ray')}") from None
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    if _NAME in ray_serve.status().applications:
        raise MemFlowError("this cluster runs `memflow serve` already")
    quiet = {"log_level": "WARNING", "enable_access_log": False}  # addresses may hold a token
    ray_serve.start(http_options={"host": host, "port": port}, logging_config=quiet)
    options: dict[str, Any] = {"num_replicas": replicas, "max_ongoing_requests": _connections(settings)}
    options |= {"ray_actor_options": takes, "graceful_shutdown_timeout_s": _GRACE, "logging_config": quiet}
    app = ray_serve.ingress(lambda: make())  # Ray wants a plain function
    deployment = ray_serve.deployment(**options)(app(_Replica))
    try:
        try:
            handle = ray_serve.run(deployment.bind(), name=_NAME, route_prefix="/")
        except RuntimeError as error:
            raise MemFlowError(f"the replicas cannot start: {str(error).strip().splitlines()[-1]}") from None
        yield
        # In a thread of its own: Ray refuses to wait where an event loop runs, as in a notebook.
        thread = ThreadPoolExecutor(1)
        try:
            thread.submit(lambda: handle.broadcast("save").results(timeout_s=_GRACE)).result()
        finally:
            thread.shutdown(wait=False)  # a second Ctrl-C waits for no replica
    finally:
        ray_serve.delete(_NAME)
        if not ray_serve.status().applications:  # others may use it too
            ray_serve.shutdown()


class _Replica:
    """One of the deployment, around the app."""

    async def save(self) -> None:
        """Save every story and end it. Ray itself waits for connections to end, and then ends the process."""
        await self.app.state.stories.stop()


def _app(request: Serving, settings: Settings) -> Starlette:
    return make_app(lambda: _load(request, ExitStack()), settings)


def _announce(what: str, settings: Settings, host: str, port: int, said: TextIO | None = None) -> None:
    name = f"[{host}]" if ":" in host else host
    asked = "/?token=..." if settings.token else "/"
    address = f"http://{name}:{port}{asked}"
    print(f"memflow serve: {shown(what)} on {address}  (Ctrl-C ends and saves)", file=said, flush=True)


def _connections(settings: Settings) -> int:
    """At once: of viewers, and of those who ask for films, the page and numbers."""
    return 4 * settings.sessions + 64


def server(app: Starlette, settings: Settings) -> uvicorn.Server:
    """The app of `make_app` as uvicorn serves it, within the limits that are uvicorn's to keep."""
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,  # addresses may hold a token
        ws_max_size=_MESSAGE,
        ws_per_message_deflate=False,
        limit_concurrency=_connections(settings),
        timeout_graceful_shutdown=_GRACE,
        server_header=False,
    )
    return uvicorn.Server(config)


def app_of_environment() -> Starlette:
    """`memflow.serve:app`: the options of `memflow serve` come from MEMFLOW_SERVE_MODEL, MEMFLOW_SERVE_TOKEN and so on;
    MEMFLOW_SERVE_ALLOW_ORIGIN may hold several, with spaces between."""
    given: dict[str, Any] = {}
    for field in fields(Serving):
        variable = f"MEMFLOW_SERVE_{'DIR' if field.name == 'folder' else field.name.upper()}"
        value = os.environ.get(variable)
        if value is not None and field.name not in ("host", "port", "ray", "replicas"):
            kinds: dict[str, Any] = {"sessions": _sessions, "folder": Path, "decoder": Path, "allow_origin": str.split}
            if field.name in _CHOICES:
                kinds[field.name] = partial(_chosen, variable, _CHOICES[field.name])
            given[field.name] = kinds.get(field.name, str)(value)
    request = Serving(**given)
    settings = settings_of(request)
    return _app(request, settings)


def _chosen(variable: str, known: dict[str, Any], text: str) -> Any:
    if text.lower() not in known:
        raise MemFlowError(f"{variable}: one of {', '.join(known)} is needed, {text[:60]!r} came")
    return known[text.lower()]


def _sessions(text: str) -> int:
    if not re.fullmatch(r"[1-9][0-9]{0,5}", text):
        raise MemFlowError(f"MEMFLOW_SERVE_SESSIONS: a whole number of at least 1 is needed, {text[:60]!r} came")
    return int(text)


def settings_of(request: Serving) -> Settings:
    """What the options allow.

    Raises:
        MemFlowError: a token or an origin that cannot be, an address that is not one of this machine alone without a
            token, or a folder that cannot be made.
    """
    if request.token is not None and len(request.token) < 8:
        raise MemFlowError("--token must have at least 8 characters")
    if request.token is not None and not re.fullmatch(r"[!-~]+", request.token):
        raise MemFlowError("--token must be of ASCII letters, digits and signs, without blanks: headers hold no others")
    for origin in request.allow_origin or ():
        if not re.fullmatch(r"https?://[^\s/?#@*]+/?", origin):
            raise MemFlowError(f"--allow-origin {origin}: must be http:// or https:// and a host, and no path")
    if request.token is None and not _is_local(request.host):
        raise MemFlowError(f"--host {request.host}: others could reach it; --token SECRET is needed")
    folder = (request.folder or cache_folder() / "stories").absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MemFlowError(f"--dir {folder}: the folder cannot be made: {error.strerror}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise MemFlowError(f"--dir {folder}: nothing can be written there")
    return Settings(
        folder=folder,
        model=request.model or "storybook",
        token=request.token,
        origins=tuple(request.allow_origin or ()),
        hosts=(request.host,),
        sessions=request.sessions,
    )


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """A socket for `server`, bound to a free port if `port` is 0; MemFlowError where it cannot be had."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Connections inherit both. A reader that is gone or does not read is given up by the system itself: a server
        # can close such a connection, but not make it go away.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(Settings.send_seconds * 1e3))
        listening.bind(address)
        listening.listen(128)  # from here on whoever comes waits for the model to be loaded, and is not turned away
    except OSError as error:
        raise MemFlowError(f"--host {host} --port {port}: {error.strerror}") from None
    return listening


def _load(request: Serving, stack: ExitStack) -> tuple[Any, dict[str, str]]:
    """The pipeline, and what states say of it. Its backend is in force until `stack` ends."""
    warnings.simplefilter("ignore", MemFlowWarning)  # who writes a prompt is told, not who runs the server
    loaded = loading.load(request)
    stack.enter_context(loading.backend(request.backend, loaded.device))
    return loaded.pipeline, loaded.about

"""The app of `memflow serve` as a Ray Serve deployment: replicas that keep their stories in one folder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from starlette.types import ASGIApp

from memflow.errors import MemFlowError, install_command

_NAME = "memflow"


@contextmanager
def deployed(
    make: Callable[[], ASGIApp], replicas: int, *, host: str, port: int, connections: int, grace: float, takes: dict
) -> Iterator[None]:
    """Serve an app from the cluster that this process is connected to; at the end of the block its stories are saved.

    Args:
        make: makes the app of a replica (`memflow.serve.asgi.make_app`), where it runs.
        replicas: how many.
        host: where Ray's proxies listen, one on every machine that has a replica.
        port: of the proxies.
        connections: that a replica holds at once.
        grace: seconds for saving.
        takes: what a replica takes of the cluster, "num_gpus" for example.

    Raises:
        MemFlowError: Ray Serve is not installed, runs this app already, or the replicas cannot start.
    """
    try:
        from ray import serve
    except ModuleNotFoundError:
        raise MemFlowError(f"--ray needs Ray Serve: {install_command('ray')}") from None
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    if _NAME in serve.status().applications:
        raise MemFlowError("this cluster runs `memflow serve` already")
    quiet = {"log_level": "WARNING", "enable_access_log": False}  # addresses may hold a token
    serve.start(http_options={"host": host, "port": port}, logging_config=quiet)
    options: dict[str, Any] = {"num_replicas": replicas, "max_ongoing_requests": connections, "logging_config": quiet}
    options |= {"ray_actor_options": takes, "graceful_shutdown_timeout_s": grace}
    deployment = serve.deployment(**options)(serve.ingress(lambda: make())(_Replica))  # Ray wants a plain function
    try:
        try:
            handle = serve.run(deployment.bind(), name=_NAME, route_prefix="/")
        except RuntimeError as error:
            raise MemFlowError(f"the replicas cannot start: {str(error).strip().splitlines()[-1]}") from None
        yield
        # In a thread of its own: Ray refuses to wait where an event loop runs, as in a notebook.
        thread = ThreadPoolExecutor(1)
        try:
            thread.submit(lambda: handle.broadcast("save").results(timeout_s=grace)).result()
        finally:
            thread.shutdown(wait=False)  # a second Ctrl-C waits for no replica
    finally:
        serve.delete(_NAME)
        if not serve.status().applications:  # others may use it too
            serve.shutdown()


class _Replica:
    """One of the deployment, around the app."""

    async def save(self) -> None:
        """Save every story and end it. Ray itself waits for connections to end, and then ends the process."""
        await self.app.state.stories.stop()

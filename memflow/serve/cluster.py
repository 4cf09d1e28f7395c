"""`memflow serve --ray`: the same app as a Ray Serve deployment, replicas that keep their stories in one folder."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from memflow.cli import Interrupt
from memflow.cli.serving import Serving
from memflow.errors import MemFlowError, install_command
from memflow.serve.app import make_app
from memflow.serve.command import GRACE, listen, load, settings_of
from memflow.serve.settings import Settings
from memflow.tellers.actors import cluster

_NAME = "memflow"


def serve(request: Serving) -> int:
    """Serve from a cluster until Ctrl-C or SIGTERM; every story is saved then.

    Args:
        request: the options.

    Returns:
        0.

    Raises:
        MemFlowError: as without a cluster; no cluster, or replicas that cannot start.
    """
    settings, said = settings_of(request), sys.stdout
    with listen(request.host, request.port) as free:
        host, port = free.getsockname()[:2]
    with cluster(request.ray) as resources, Interrupt() as interrupt:
        interrupt.notify = lambda: None
        gpus = bool(resources.get("GPU")) and request.device != "cpu"
        with deployed(request, settings, host, port, {"num_gpus" if gpus else "num_cpus": 1}):
            where = f"http://{f'[{host}]' if ':' in host else host}:{port}{'/?token=...' if settings.token else '/'}"
            count = f"{request.replicas or 1} replicas of {settings.model}"
            print(f"memflow serve: {count} on {where}  (Ctrl-C ends and saves)", file=said, flush=True)
            while not interrupt.requested:
                time.sleep(0.2)
    return 0


@contextmanager
def deployed(request: Serving, settings: Settings, host: str, port: int, resources: dict[str, Any]) -> Iterator[None]:
    """The app on the cluster that this process is connected to; at the end of the block its stories are saved.

    Args:
        request: the options.
        settings: what is allowed; sessions are those of one replica.
        host: where Ray's proxies listen.
        port: of the proxies.
        resources: that a replica takes, as `ray_actor_options` has them.

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
    options = {"num_replicas": request.replicas or 1, "max_ongoing_requests": 4 * settings.sessions + 64}
    options |= {"ray_actor_options": resources, "logging_config": quiet, "graceful_shutdown_timeout_s": GRACE}
    deployment = serve.deployment(**options)(serve.ingress(lambda: _app(request, settings))(Replica))
    try:
        try:
            handle = serve.run(deployment.bind(), name=_NAME, route_prefix="/")
        except RuntimeError as error:
            raise MemFlowError(f"the replicas cannot start: {str(error).strip().splitlines()[-1]}") from None
        yield
        handle.broadcast("save").results(timeout_s=GRACE)
    finally:
        serve.delete(_NAME)
        if not serve.status().applications:
            serve.shutdown()


class Replica:
    """One of the deployment, around the app."""

    async def save(self) -> None:
        """Save every story and end it. Ray itself waits for connections to end, and then ends the process."""
        await self.app.state.stories.stop()


def _app(request: Serving, settings: Settings):
    return make_app(lambda: load(request, settings, ExitStack()), settings)

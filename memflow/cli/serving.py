"""The options of `memflow serve`, and `memflow serve` itself. Those of the model are those of `memflow generate`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from memflow.cli.options import _PRESETS, Request, _late, _of, _reads, app
from memflow.errors import MemFlowError

_model, _server = Request.__annotations__, _of("Serving")


@dataclass(frozen=True)
class Serving:
    """The options of `memflow serve`; None = not given."""

    host: Annotated[
        str, _server(metavar="ADDRESS", help="Where to listen; other than this machine alone needs --token.")
    ] = "127.0.0.1"
    port: Annotated[int, _server(min=0, max=65535, help="0: any that is free.")] = 8765
    token: Annotated[
        str | None,
        _server(metavar="SECRET", envvar="MEMFLOW_SERVE_TOKEN", help="What whoever uses the server must know."),
    ] = None
    sessions: Annotated[int, _server(min=1, metavar="N", help="Stories told at the same time.")] = 8
    folder: Annotated[
        Path | None,
        _server("--dir", metavar="FOLDER", help="Where films and states are kept. \\[default: in the user's cache]"),
    ] = None
    allow_origin: Annotated[
        list[str] | None,
        _server(metavar="ORIGIN", help="Another address of this server, or of a page that may use it. Repeatable."),
    ] = None
    ray: Annotated[
        str | None,
        _server(
            metavar="ADDRESS",
            help="Serve from a Ray cluster: at ADDRESS, else at RAY_ADDRESS, else the one that runs here, else one is "
            "started. Its machines share --dir.",
        ),
    ] = None
    replicas: Annotated[
        int | None, _server(min=1, metavar="N", help="Models of the cluster, each with --sessions. \\[default: 1]")
    ] = None
    model: _model["model"] = None
    preset: _model["preset"] = None
    decoder: _model["decoder"] = None
    device: _model["device"] = None
    dtype: _model["dtype"] = None
    backend: _model["backend"] = None
    prompt_cache: _model["prompt_cache"] = True


@app.command(epilog=_PRESETS)
@_reads(Serving)
def serve(request: Serving) -> int:
    """Tell stories live: a page to steer them, and an address for programs (docs/serving.md)."""
    if request.ray is None and request.replicas is not None:
        raise MemFlowError("--replicas: only with --ray")
    return _late("memflow.serve.command:serve")(request)

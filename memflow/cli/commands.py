"""The commands of `memflow`. Where one does its work is imported when it runs, so that options are read without it."""

from importlib import import_module
from typing import Annotated, Any

import typer

from memflow.cli.options import Converting, Download, Needs, Request, Serving, reads
from memflow.errors import MemFlowError
from memflow.models.wan.published import MODELS, PRESETS

app = typer.Typer(
    help="Stories that stream out as video and remember who was in them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
_PRESETS = f"Presets: {', '.join(PRESETS)}"  # in a column beside its option a long name would be cut


def _late(place: str) -> Any:
    """What stands at "module:name"."""
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


def _plain(options: Any) -> dict[str, Any]:
    """Options by name, without the enums."""
    return {name: getattr(value, "value", value) for name, value in vars(options).items()}


def _version(wanted: bool) -> None:
    if wanted:
        from memflow import __version__

        typer.echo(f"memflow {__version__}")
        raise typer.Exit


@app.callback()
def _memflow(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it and end.")
    ] = False,
) -> None:
    pass


@app.command(epilog=_PRESETS)
@reads(Request)
def generate(request: Request) -> int:
    """Make the video of a story, written chunk by chunk while it is made."""
    many = request.jobs is not None or request.ray is not None
    return _late("memflow.cli.many:generate_many" if many else "memflow.cli.generate:generate")(request)


@app.command(epilog=_PRESETS)
@reads(Converting)
def convert(options: Converting) -> None:
    """Turn original checkpoint files into a folder for --model; an interrupted conversion continues."""
    given = _plain(options)
    given["shard_bytes"] = round(given.pop("shard_gigabytes") * 10**9)
    _late("memflow.convert:convert")(_late("memflow.convert:Conversion")(**given))


@app.command(epilog=f"Models: {', '.join(MODELS)}")
@reads(Download)
def download(options: Download) -> None:
    """Fetch published files from the Hugging Face hub, after showing licences and sizes; what is there stays."""
    _late("memflow.convert.download:download")(options.name, options.output, yes=options.yes)


@app.command()
@reads(Needs)
def doctor(options: Needs) -> None:
    """Show what this machine can run, and why not the rest; with --model, what a model needs."""
    _late("memflow.cli.doctor:doctor")(**_plain(options))


@app.command(epilog=_PRESETS)
@reads(Serving)
def serve(request: Serving) -> int:
    """Tell stories live: a page to steer them, and an address for programs (docs/serving.md)."""
    if request.ray is None and request.replicas is not None:
        raise MemFlowError("--replicas: only with --ray")
    return _late("memflow.serve.command:serve")(request)

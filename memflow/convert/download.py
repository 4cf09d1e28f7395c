"""`memflow download`: the published files from the Hugging Face hub.

Sizes and the licence that a model card states come from the hub at the time of the download.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import typer
from huggingface_hub import HfApi
from rich.console import Console

from memflow.convert.shards import check_room
from memflow.errors import MemFlowError, first_line, shown
from memflow.models.wan.published import MODELS, Repository


@dataclass(frozen=True)
class Found:
    """What the hub holds of a repository now."""

    repository: Repository
    revision: str
    files: dict[str, int]  # name to bytes
    licence: str | None  # of the model card, if it states one


def download(name: str, output: Path, *, yes: bool = False) -> None:
    """Fetch the files of a published model, one folder per repository; files that are complete stay.

    Args:
        name: One of `memflow.models.wan.published.MODELS`.
        output: The folder to write.
        yes: Accept the licences, which are shown first, as are the sizes, without a question at the keyboard.

    Raises:
        MemFlowError: Something is missing, there or here, or the answer was no.
    """
    if name not in MODELS:
        raise MemFlowError(f"there is no model {name!r} to download; there are {', '.join(MODELS)}")
    hub, console = HfApi(), Console(stderr=True, highlight=False, markup=False)
    with console.status("asking the hub"):
        found = [_look_up(hub, repository) for repository in MODELS[name].repositories]
    _show(found, console)
    total = sum(sum(entry.files.values()) for entry in found)
    there = sum(path.stat().st_size for path in output.rglob("*") if path.is_file()) if output.is_dir() else 0
    check_room(output, total - there)
    if not yes and not typer.confirm("Do you accept the licences, and download?", default=False, err=True):
        raise MemFlowError("nothing was downloaded (--yes answers the question)")
    for entry in found:
        folder = output / entry.repository.name.split("/")[1]
        for file in entry.files:
            _ask(hub.hf_hub_download, entry.repository.name, filename=file, revision=entry.revision, local_dir=folder)
    preset = f" --preset {name}" if MODELS[name].preset else ""
    console.print(shown(f"next: memflow convert {output} -o {name}{preset}"), soft_wrap=True)


def _look_up(hub: HfApi, repository: Repository) -> Found:
    info = _ask(hub.model_info, repository.name, files_metadata=True)
    sizes = {entry.rfilename: entry.size or 0 for entry in info.siblings or ()}
    files = {}
    for pattern in repository.files:
        matching = {name: size for name, size in sizes.items() if fnmatch(name, pattern)}
        if not matching:
            raise MemFlowError(f"{repository.name} on the hub has no {pattern} (any more); it has {', '.join(sizes)}")
        files |= matching
    return Found(repository, info.sha, files, getattr(info.card_data, "license", None))


def _ask(request, *arguments, **options):
    """A call to the hub; whatever goes wrong there (no network, no such repository, no access) is said in one line."""
    try:
        return request(*arguments, **options)
    except Exception as error:  # the errors of several network libraries, which have no base in common
        said = f"{arguments[0]} cannot be fetched from the Hugging Face hub: {first_line(error)}"
        raise MemFlowError(said) from error


def _show(found: list[Found], console: Console) -> None:
    for entry in found:
        console.print(entry.repository.name, style="bold")
        for file, size in entry.files.items():
            console.print(shown(f"  {size / 1e9:7.2f} GB  {file}"), soft_wrap=True)
        stated = f"; its model card: {entry.licence}" if entry.licence else ""
        console.print(shown(f"  licence: {entry.repository.licence}{stated}"), soft_wrap=True)
    total = sum(sum(entry.files.values()) for entry in found)
    console.print(f"{total / 1e9:.2f} GB in all; the licences are between you and those who published the files")

"""What is said to the person at the keyboard: the error, the warning, and how to install what is missing."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_UNSEEN = re.compile("[\0-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class MemFlowError(ValueError):
    """Something the user gave, or something a run met, that can be said in one line.

    The command line prints the message and ends with exit code 2; everything else is a defect and keeps its traceback.
    """


class OutOfMemory(MemFlowError):
    """A story that this machine, or its GPU, has no room for."""


class MemFlowWarning(UserWarning):
    """Something the user gave is not used as it stands: a prompt that is cut, a word that the model does not know."""


@contextmanager
def warned(say: Callable[[str], None]) -> Iterator[None]:
    """Inside, what memflow warns of goes to `say`, as often as it does."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", MemFlowWarning)
        usual = warnings.showwarning
        warnings.showwarning = lambda message, category, *rest: (
            say(str(message)) if issubclass(category, MemFlowWarning) else usual(message, category, *rest)
        )
        yield


def shown(text: object) -> str:
    """`text` for a terminal: what could command it, turn the writing direction or not be encoded is escaped."""
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def first_line(error: Exception) -> str:
    """What a library says of an error, in a line of its own; the name of the class where it says nothing."""
    said = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"there is no {said}" if isinstance(error, KeyError) and error.args and " " not in said else said


def install_command(extra: str) -> str:
    """The command that adds an extra to this very installation.

    Args:
        extra: name of the extra in pyproject.toml, "model" for example.

    Returns:
        A line for a shell. It names the checkout or the file that the package was installed from, so that it works
        without the package being on an index.
    """
    # Rarely needed, and this file is imported by everything.
    import json
    import sys
    from importlib import metadata
    from importlib.util import find_spec
    from pathlib import Path
    from urllib.parse import unquote, urlsplit

    pip = f"{sys.executable} -m pip install" if find_spec("pip") else f"uv pip install --python {sys.executable}"
    checkout = Path(__file__).parents[1]
    try:
        origin = json.loads(metadata.distribution("memflow-kernels").read_text("direct_url.json") or "{}")
    except metadata.PackageNotFoundError:  # run from a checkout without being installed
        origin = {"url": checkout.as_uri(), "dir_info": {"editable": True}}
    url = origin.get("url", "")
    if "dir_info" in origin:
        editable = "-e " if origin["dir_info"].get("editable") else ""
        return f"{pip} {editable}'{unquote(urlsplit(url).path)}[{extra}]'"
    if url:
        kind = origin.get("vcs_info", {}).get("vcs")
        return f"{pip} 'memflow-kernels[{extra}] @ {f'{kind}+' if kind else ''}{url}'"
    return f"{pip} 'memflow-kernels[{extra}]'"


def missing_package(error: ModuleNotFoundError) -> str | None:
    """What to install, as one sentence; None if what is missing is a part of this package, which is a defect."""
    package = (error.name or "").partition(".")[0]
    if package in ("", "memflow", "memflow_kernels"):
        return None
    return f"this needs the package {package!r}: {install_command('model')}"

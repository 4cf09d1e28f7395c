"""The recorded cases: a directory with manifest.json, named by MEMFLOW_GOLDEN, by default the copy kept here."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

from safetensors.torch import load_file


def directory() -> Path:
    return Path(os.environ.get("MEMFLOW_GOLDEN") or Path(__file__).parent / "data")


@functools.cache
def manifest() -> dict:
    return json.loads((directory() / "manifest.json").read_text())


@functools.cache
def tensors(file: str) -> dict:
    return load_file(directory() / file)

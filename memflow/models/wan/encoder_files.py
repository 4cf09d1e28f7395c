"""Which text encoder lies in a pipeline's folder: a digest of its files and the tokenizer's, read once."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path

from memflow.files import write_whole

_SMALL = 32 * 2**20  # bytes of a file that is read each time: quicker than asking whether it is known


def encoder_digest(model: Path) -> str:
    """SHA-256 over names and contents of all files of a pipeline's text encoder and tokenizer.

    A large file (11 GB of a real model: some ten seconds) is read once; its digest is kept for its place, size and
    time of change, under XDG_CACHE_HOME.

    Args:
        model: The folder of the pipeline.
    """
    digest = hashlib.sha256()
    for part in ("text_encoder", "tokenizer"):
        for path in sorted(path for path in (model / part).rglob("*") if path.is_file()):
            digest.update(f"{path.relative_to(model)} {_contents(path)}\n".encode())
    return digest.hexdigest()


def prompt_folder(encoder: str) -> Path:
    """Where the embeddings of an encoder's prompts are kept.

    Args:
        encoder: As `encoder_digest` gives it: one folder for all equal encoders.
    """
    return _cache() / "prompts" / encoder[:32]


def _cache() -> Path:
    """An XDG_CACHE_HOME that is not absolute is ignored, as the standard says."""
    home = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (home if home.is_absolute() else Path.home() / ".cache") / "memflow"


def _contents(path: Path) -> str:
    stat = path.stat()
    if stat.st_size <= _SMALL:
        return _read(path)
    key = f"{path.resolve()} {stat.st_dev} {stat.st_ino} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"
    kept = _cache() / "digests" / hashlib.sha256(key.encode()).hexdigest()
    with suppress(OSError, ValueError):
        digest, check = kept.read_text().split()
        if check == _check(key, digest):
            return digest
    digest = _read(path)
    with suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_whole(kept, lambda file: file.write(f"{digest} {_check(key, digest)}\n".encode()))
    return digest


def _check(key: str, digest: str) -> str:
    """Tells a damaged entry from a whole one."""
    return hashlib.sha256(f"{key} {digest}".encode()).hexdigest()


def _read(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()

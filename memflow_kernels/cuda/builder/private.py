"""A folder of the user's own, and a library in it that nobody has changed: what is loaded has all the user's rights."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

_OF_OTHERS = stat.S_IWGRP | stat.S_IWOTH


class NotOurs(OSError):
    """A file or folder is a link, or can be written to by somebody else."""


def make_private(folder: Path) -> None:
    """Make `folder`, and those above it that are missing, for this user alone, whatever the umask.

    Args:
        folder: where the library is to lie.

    Raises:
        NotOurs: it is there and is a link, or belongs to another user.
        OSError: it cannot be made.
    """
    missing = [folder, *folder.parents]
    for part in reversed([part for part in missing if not os.path.lexists(part)]):
        part.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if stat.S_ISLNK(found.st_mode):
        raise NotOurs(f"{folder} is a link")
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(f"{folder} is no folder")
    if not _trusted(found):
        raise NotOurs(f"{folder} belongs to another user ({found.st_uid})")
    if found.st_mode & _OF_OTHERS:
        folder.chmod(0o700)


def open_lock(path: Path) -> int:
    """A file descriptor to lock; the file is made where it is missing, never emptied and never reached by a link."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def seal(library: Path) -> None:
    """Take from others the right to write to `library`, and keep its digest beside it."""
    library.chmod(0o600)
    beside = _beside(library)
    beside.write_text(_digest(library))
    beside.chmod(0o600)


def move_sealed(library: Path, place: Path) -> None:
    """Put a sealed library and its digest at `place`."""
    os.replace(_beside(library), _beside(place))
    os.replace(library, place)


def is_whole(library: Path) -> bool:
    """Whether `library` is there, ours and as it was sealed: a regular file that nobody else could write to, in such a
    folder, with the digest beside it."""
    try:
        if not all(_is_ours(path) for path in (library.parent, library, _beside(library))):
            return False
        return library.stat().st_size > 0 and _beside(library).read_text() == _digest(library)
    except (OSError, UnicodeDecodeError):
        return False


def _is_ours(path: Path) -> bool:
    found = path.lstat()
    regular = stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)
    return regular and _trusted(found) and not found.st_mode & _OF_OTHERS


def _trusted(found: os.stat_result) -> bool:
    return found.st_uid in (os.geteuid(), 0)  # root can do as it likes anyway, and prepares images


def _beside(library: Path) -> Path:
    return library.with_name(library.name + ".sha256")


def _digest(library: Path) -> str:
    total = hashlib.sha256()
    with open(library, "rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()

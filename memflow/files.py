"""Files that are whole or not there: written under no name or another one, then put in place in one step. Also the
header of a safetensors file, and the folder of what can be made again."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

_PREFIX, _SUFFIX = ".memflow-", ".partial"
_STALE = 3600.0  # seconds after which a file under such a name belongs to a process that is gone


def write_whole(path: str | os.PathLike, write: Callable[[BinaryIO], None]) -> None:
    """Replace the file `path` by what `write` writes; a reader finds the old contents or the new ones, never a part.

    When it returns, the new contents survive a loss of power. Where Linux can, the file has no name until it is
    complete, so that a process that is killed leaves nothing, but for the instant between its name and its place. What
    is left behind then, and elsewhere, the next call removes: at once where the process ran on this host and is gone,
    otherwise an hour later.

    Args:
        path: the file; a link is followed, its permissions stay.
        write: gets the open file.

    Raises:
        OSError: as the file system says; nothing has changed then.
    """
    path = Path(os.path.realpath(path))
    for left in path.parent.glob(f"{_PREFIX}*{_SUFFIX}"):
        with suppress(OSError, OverflowError):
            if _is_orphan(left.name) or time.time() - left.stat().st_mtime > _STALE:
                left.unlink()
    before = path.stat() if path.exists() else None
    if before is not None and not stat.S_ISREG(before.st_mode):  # a device would be replaced by a file
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
    new = path.parent / f"{_PREFIX}{_host()}-{os.getpid()}-{os.urandom(8).hex()}{_SUFFIX}"
    name = None
    try:
        descriptor = os.open(path.parent, os.O_TMPFILE | os.O_WRONLY, 0o666)
    except (AttributeError, OSError):  # not Linux, or a file system without it
        descriptor = os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        name = os.fspath(new)
    try:
        with open(descriptor, "wb") as file:
            if before is not None:
                os.chmod(file.fileno() if name is None else name, stat.S_IMODE(before.st_mode))
            write(file)
            file.flush()
            os.fsync(file.fileno())
            if name is None:
                with _opened(path.parent) as folder:  # given a folder, Python follows the link that /proc shows
                    os.link(f"/proc/self/fd/{file.fileno()}", new.name, dst_dir_fd=folder)
                name = os.fspath(new)
        os.replace(name, path)
        name = None
    finally:
        if name is not None:
            with suppress(OSError):
                os.unlink(name)
    with _opened(path.parent) as folder, suppress(OSError):  # some file systems cannot; the file itself is safe
        os.fsync(folder)


def claim(file: IO) -> bool:
    """Hold an open file for this process alone, until it is closed or the process gone.

    Returns:
        False: another one holds it. Where there are no locks (not Unix, some file systems) nobody is told apart: True.
    """
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        pass
    return True


def tensors_header(metadata: dict[str, str], tensors: Iterable[tuple[str, str, list[int], int]], **how: Any) -> bytes:
    """The beginning of a safetensors file (https://github.com/huggingface/safetensors#format): the length of the header
    (8 bytes, little endian) and the header as JSON, padded with spaces to a multiple of 8 bytes.

    Args:
        metadata: texts by name.
        tensors: name, format ("F32" for example), shape and bytes of each, in the order in which they follow.
        how: options of json.dumps.
    """
    header: dict[str, dict] = {"__metadata__": metadata}
    end = 0
    for name, kind, shape, size in tensors:
        begin, end = end, end + size
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, **how).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def cache_folder() -> Path:
    """For what can be made again; an XDG_CACHE_HOME that is not absolute is ignored, as its standard says."""
    home = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (home if home.is_absolute() else Path.home() / ".cache") / "memflow"


def _host() -> str:
    """Tells apart the hosts that share a folder, in letters that any file name may have."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:12]


def _is_orphan(name: str) -> bool:
    """Whether a process of this host gave a file this name and is gone."""
    host, _, rest = name.removeprefix(_PREFIX).partition("-")
    pid = rest.partition("-")[0]
    if host != _host() or not pid.isdecimal():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except OSError:  # it is another user's, whom /proc, which psutil asks, need not show
        return False
    return False


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)

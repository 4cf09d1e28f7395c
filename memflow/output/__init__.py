"""What a story leaves on disk: the video, the picture of its memory; and here, whether a file can be written at all."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from memflow.errors import MemFlowError

if TYPE_CHECKING:
    import numpy as np


def check_writable(path: str | Path, *suffixes: str) -> None:
    """Make sure that a file can be written, and leave everything as it was.

    Args:
        path: of the file; a link counts as what it points to, also if that is not there yet.
        suffixes: what will be appended to its name for other files in its folder.

    Raises:
        MemFlowError: naming the path, and why nothing can be written there.
    """
    real = os.path.realpath(path)
    try:
        regular = stat.S_ISREG(os.stat(real).st_mode)
    except FileNotFoundError:
        regular = None
    except OSError as error:
        raise MemFlowError(f"{path}: cannot be written: {error.strerror}") from None
    if os.path.isdir(real):
        raise MemFlowError(f"{path}: is a folder, the name of a file is needed")
    if regular is False:
        raise MemFlowError(f"{path}: is not a regular file (a pipe or a device), nothing can be written back into it")
    for name in (real, *(real + suffix for suffix in suffixes)):
        new = not os.path.lexists(name)
        try:
            with open(name, "ab"):
                pass
        except FileNotFoundError:
            raise MemFlowError(f"{path}: the folder {Path(path).parent} does not exist") from None
        except OSError as error:
            raise MemFlowError(f"{path}: cannot be written: {error.strerror}") from None
        if new:
            os.unlink(name)


def check_regular(path: str | Path) -> None:
    """Raise MemFlowError unless `path` is a regular file that is there: others may never end, or never begin."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise MemFlowError(f"{path}: cannot be read: {error.strerror}") from None
    if stat.S_ISDIR(mode):
        raise MemFlowError(f"{path}: is a folder, a file is needed")
    if not stat.S_ISREG(mode):
        raise MemFlowError(f"{path}: is not a regular file (a pipe or a device)")


def jpeg(frame: np.ndarray, quality: int, most: tuple[int, int] | None = None) -> bytes:
    """A frame, uint8 [H, W, 3], as JPEG; no larger than `most`, (width, height) in pixels."""
    from PIL import Image

    image, file = Image.fromarray(frame), io.BytesIO()
    if most is not None:
        image.thumbnail(most)
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()

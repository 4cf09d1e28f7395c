"""Frames of a video as pictures."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from memflow.errors import MemFlowError


def jpeg(frame: np.ndarray, quality: int, within: tuple[int, int] | None = None) -> bytes:
    """A frame as JPEG.

    Args:
        frame: uint8 [H, W, 3].
        quality: 1 to 95, as Pillow counts it.
        within: width and height that it is made smaller to fit into; None: as large as it is.

    Raises:
        MemFlowError: Pillow cannot encode it.
    """
    image, file = Image.fromarray(frame), io.BytesIO()
    if within is not None:
        image.thumbnail(within)
    try:
        image.save(file, "JPEG", quality=quality)
    except OSError as error:  # a Pillow that was built without JPEG, or more than 65,500 pixels
        raise MemFlowError(f"a picture of {image.width} x {image.height} cannot be encoded: {error}") from None
    return file.getvalue()

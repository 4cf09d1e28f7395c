"""Small moving pictures, and readers of what was written of them; the folder of a tiny model."""

import os
import tempfile
from pathlib import Path

import av
import numpy as np

NOISE = str(Path(tempfile.gettempdir()) / f"memflow-noise-{os.getpid()}")  # saved by the fixture of conftest.py


def clip(number: int, frames: int = 12, height: int = 48, width: int = 64) -> np.ndarray:
    """uint8 [frames, height, width, 3], different for every `number`."""
    t, y, x = np.mgrid[:frames, :height, :width]
    colours = (2 * x + 5 * t + 40 * number, 2 * y + 3 * t, x + y + 7 * t + number)
    return np.stack([colour % 256 for colour in colours], axis=-1).astype(np.uint8)


def decode(path) -> np.ndarray:
    """All frames, uint8 [T, H, W, 3]."""
    with av.open(str(path)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])

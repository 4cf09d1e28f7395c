"""A video that is written while it is made, playable at any moment, and continued as if it had never stopped.

The file is a fragmented MP4: a header, then one fragment per chunk, each a closed group of pictures from an encoder of
its own. Nothing written is touched again but the total duration, so a run that is killed leaves a playable file, memory
use does not grow with its length, and a file cut after a fragment and continued equals the one never interrupted.
"""

from __future__ import annotations

import io
import zlib
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np

from memflow.errors import MemFlowError
from memflow.output import mp4

# No state may cross from chunk to chunk: constant quality (no rate control history), no frames out of order; one
# thread, because x264 decides differently with another number of threads and hosts differ in it.
_ENCODER = {"preset": "veryfast", "crf": "17", "bf": "0", "g": "250"}
_MUXER = {
    "movflags": "frag_keyframe+empty_moov+default_base_moof+frag_discont+skip_trailer",
    "avoid_negative_ts": "disabled",  # keeps a later chunk's timestamps instead of moving them to zero
    "fflags": "bitexact",  # no library versions in the header
}
_BT709, _LIMITED_RANGE = (
    1,
    1,
)  # of libavutil's AVColorSpace, AVColorPrimaries and AVColorTransferCharacteristic; AVColorRange


def check_output(path: str | Path) -> Path:
    """Raise MemFlowError, naming the path, unless a video can be written there; an existing file is left as it is."""
    path = Path(path)
    if path.is_dir():
        raise MemFlowError(f"{path}: is a folder, the name of an .mp4 file is needed")
    if path.suffix.lower() != ".mp4":
        raise MemFlowError(f"{path}: only .mp4 can be written, not {path.suffix or 'a name without .mp4'}")
    check_writable(path)
    if "libx264" not in av.codecs_available:
        raise MemFlowError("this build of PyAV has no libx264 encoder: install the one from PyPI (pip install av)")
    return path


def check_writable(path: Path) -> None:
    """Raise MemFlowError, naming the path, unless the file can be opened for writing; leaves everything as it was."""
    existed = path.exists()
    try:
        with open(path, "ab"):
            pass
    except FileNotFoundError:
        raise MemFlowError(f"{path}: the folder {path.parent} does not exist") from None
    except OSError as error:
        raise MemFlowError(f"{path}: cannot be written: {error.strerror}") from None
    if not existed:
        path.unlink()


class VideoWriter:
    """Writes H.264 in MP4, one closed group of pictures per `write`.

        with VideoWriter("story.mp4", fps=16) as video:
            for chunk in stream:
                video.write(chunk.frames[0])

    Args:
        path: an .mp4 file in an existing folder. A file that is there is replaced by the first `write`.
        fps: frames per second.

    Attributes:
        frames: number of frames in the file.
        checksum: CRC-32 of what follows the header of the file; equal for equal videos.

    Raises:
        MemFlowError: the path cannot be written, or is no .mp4.
    """

    def __init__(self, path: str | Path, fps: float):
        if not fps > 0:
            raise ValueError(f"fps must be positive, got {fps}")
        self.path = check_output(path)
        self.fps = Fraction(fps).limit_denominator(1001)
        self.frames = self.checksum = self._fragments = 0
        self._header = b""
        self._end = 0  # of the last whole fragment; 0 = nothing there that is kept
        self._shape: tuple[int, ...] | None = None
        self._file: BinaryIO | None = None

    @classmethod
    def resume(cls, path: str | Path, fps: float, frames: int, checksum: int | None = None) -> VideoWriter:
        """Continue a video of a VideoWriter after its first `frames` frames; the first `write` replaces later ones.

        `checksum`, the attribute of the writer when it had written `frames` frames, makes sure that it is that video.

        Raises:
            MemFlowError: the file is no such video, or its first `frames` frames are not there or not the right ones.
        """
        video = cls(path, fps)
        try:
            with open(video.path, "rb") as file:
                video._keep(file, frames)
        except OSError as error:
            raise MemFlowError(f"{path}: cannot be read: {error.strerror}") from None
        if video.frames < frames:
            raise MemFlowError(f"{path}: has {video.frames} whole frames, {frames} are needed to continue it")
        if video.frames > frames or checksum not in (None, video.checksum):
            raise MemFlowError(f"{path}: its first {frames} frames are not those that are to be continued")
        return video

    def write(self, frames: np.ndarray) -> None:
        """Append `frames`, uint8 [T, H, W, 3] with T >= 1, and flush.

        An odd H or W grows by one: its last row or column is repeated.

        Raises:
            MemFlowError: the disk is full or the like; what was written before stays playable.
        """
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
            raise ValueError(f"frames must be uint8 [T, H, W, 3], got {frames.dtype} {list(frames.shape)}")
        if self._shape not in (None, frames.shape[1:]):
            raise ValueError(f"frames must be {list(self._shape)} as before, got {list(frames.shape[1:])}")
        header, added, fragments = self._encode(frames)
        if self._header and self._header != header:
            raise MemFlowError(f"{self.path}: has another frame size or rate than the frames that are to follow")
        self._header, self._shape = header, frames.shape[1:]
        try:
            self._append(added, self.frames + len(frames))
        except OSError as error:
            raise MemFlowError(f"{self.path}: cannot be written: {error.strerror}") from None
        self.frames += len(frames)
        self._fragments += fragments
        self.checksum = zlib.crc32(added, self.checksum)

    def close(self) -> None:
        """Close the file. It was playable before and stays so."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _keep(self, file: BinaryIO, frames: int) -> None:
        """Take over the header and the fragments of the first `frames` frames; reads one fragment at a time."""
        header = mp4.read_header(file)
        field = mp4.duration_field(header)
        if field is None:
            raise MemFlowError(f"{self.path}: not a video that memflow wrote, it cannot be continued")
        self._header = header[: field.start] + bytes(8) + header[field.stop :]
        self._end = len(header)
        for fragment in mp4.fragments(file, self._end):
            if self.frames >= frames:
                break
            file.seek(fragment.start)
            self.checksum = zlib.crc32(file.read(fragment.end - fragment.start), self.checksum)
            self.frames += fragment.frames
            self._fragments += 1
            self._end = fragment.end

    def _encode(self, frames: np.ndarray) -> tuple[bytes, bytes, int]:
        """The header of a file with such frames, `frames` as fragments that continue it, and how many fragments."""
        height, width = frames.shape[1:3]
        if height % 2 or width % 2:
            frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        file = io.BytesIO()
        with av.open(file, "w", format="mp4", options=_MUXER | {"fragment_index": str(self._fragments + 1)}) as output:
            stream = output.add_stream("libx264", rate=self.fps, options=_ENCODER)
            stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
            encoder = stream.codec_context
            encoder.thread_count = 1
            encoder.time_base = 1 / self.fps
            encoder.colorspace = encoder.color_primaries = encoder.color_trc = _BT709
            encoder.color_range = _LIMITED_RANGE
            for index, frame in enumerate(frames, start=self.frames):
                picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
                picture = picture.reformat(format="yuv420p", dst_colorspace=_BT709, dst_color_range=_LIMITED_RANGE)
                picture.pts, picture.time_base = index, encoder.time_base
                output.mux(stream.encode(picture))
            output.mux(stream.encode(None))
        header = mp4.read_header(file)
        added = file.getvalue()[len(header) :]
        return mp4.with_duration_box(header), added, sum(1 for _ in mp4.fragments(file, len(header)))

    def _append(self, added: bytes, frames: int) -> None:
        """Write fragments that bring the file to `frames` frames, then its new duration: readable after each step."""
        if self._file is None:
            self._file = open(self.path, "r+b" if self._end else "wb")  # noqa: SIM115 (close() closes it)
        file = self._file
        file.truncate(self._end)
        if not self._end:
            file.seek(0)
            file.write(self._header)
            self._end = len(self._header)
        # Whoever kills the process now leaves a box of padding up to the end of the file, which readers skip ...
        file.seek(self._end)
        file.write(mp4.PADDING_TO_END + added[len(mp4.PADDING_TO_END) :])
        file.flush()
        # ... and these eight bytes, written at once, make it a fragment.
        file.seek(self._end)
        file.write(added[: len(mp4.PADDING_TO_END)])
        file.flush()
        self._end += len(added)
        file.seek(mp4.duration_field(self._header).start)
        file.write(round(frames / self.fps * mp4.MOVIE_TIMESCALE).to_bytes(8, "big"))
        file.flush()

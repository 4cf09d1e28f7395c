"""A video that is written while it is made, playable at any moment, and continued as if it had never stopped.

The file is a fragmented MP4 (ISO/IEC 14496-12): `ftyp moov`, the header, then `moof mdat` per chunk, each a closed
group of pictures from an encoder of its own. Nothing written is touched again but the total duration, so a run that is
killed leaves a playable file, memory use does not grow with its length, and a file cut after a fragment and continued
equals the one never interrupted. The muxer leaves out the duration, which it cannot know; `mehd`, the box for it, is
inserted here at the size it needs and filled in as the file grows.
"""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np

from memflow.errors import MemFlowError
from memflow.output import check_writable

# No state may cross from chunk to chunk: constant quality (no rate control history), no frames out of order; one
# thread, because x264 decides differently with another number of threads and hosts differ in it.
# No macroblock tree: with it x264 makes other bytes of the same frames a few times in a thousand, by what lay in memory
# before (46 of 5,000 encodings of 64 x 48 pixels; without it none of 7,000).
_ENCODER = {"preset": "veryfast", "crf": "17", "bf": "0", "g": "250", "mbtree": "0"}
_MUXER = {
    "movflags": "frag_keyframe+empty_moov+default_base_moof+frag_discont+skip_trailer",
    "avoid_negative_ts": "disabled",  # keeps a later chunk's timestamps instead of moving them to zero
    "fflags": "bitexact",  # no library versions in the header
}
_BT709 = 1  # of libavutil's AVColorSpace, AVColorPrimaries and AVColorTransferCharacteristic
_LIMITED_RANGE = 1  # of its AVColorRange
_MOVIE_TIMESCALE = 1000  # units per second of durations in the header, as libavformat writes it
_PADDING_TO_END = bytes(4) + b"free"  # the head of a box of padding; size 0 = up to the end of the file
_MEHD = (20).to_bytes(4, "big") + b"mehd" + bytes([1, 0, 0, 0]) + bytes(8)  # version 1: 64 bits of duration, 0 here


def check_output(path: str | Path) -> Path:
    """Raise MemFlowError, naming the path, unless a video can be written there; an existing file is left as it is."""
    path = Path(path)
    if path.suffix.lower() != ".mp4":
        raise MemFlowError(f"{path}: only .mp4 can be written, not {path.suffix or 'a name without .mp4'}")
    check_writable(path)
    if "libx264" not in av.codecs_available:
        raise MemFlowError("this build of PyAV has no libx264 encoder: install the one from PyPI (pip install av)")
    return path


def is_ours(path: str | Path) -> bool:
    """Whether the file was written by a VideoWriter, from its header alone."""
    with open(path, "rb") as file:
        header = _read_header(file)
    return _duration_field(header) is not None


def marked(state: dict[str, str]) -> tuple[int, int]:
    """Frames and checksum, for `VideoWriter.resume`, from a state that keeps the writer's `mark`."""
    return int(state["video_frames"]), int(state["video_checksum"])


class VideoWriter:
    """Writes H.264 in MP4, one closed group of pictures per `write`, to a file or to whoever takes the bytes.

    Args:
        path: an .mp4 file in an existing folder; a file that is there is replaced by the first `write`. None: there is
            no file, the bytes that `write` returns are for the caller to send.
        fps: frames per second.

    Attributes:
        frames: number of frames written.
        checksum: CRC-32 of what follows the header; equal for equal videos.
        header: the bytes that a player needs before any of those that `write` returns; known after the first `write`.

    Raises:
        MemFlowError: the path cannot be written, or is no .mp4.

    Example:
        >>> import numpy as np
        >>> video = VideoWriter(None, fps=16)
        >>> chunk = video.write(np.zeros((12, 64, 64, 3), np.uint8))
        >>> video.frames, video.codec, video.header[4:8], chunk[4:8]
        (12, 'avc1.64000A', b'ftyp', b'moof')
    """

    def __init__(self, path: str | Path | None, fps: float):
        if not fps > 0:
            raise ValueError(f"fps must be positive, got {fps}")
        self.path = None if path is None else check_output(path)
        self.fps = Fraction(fps).limit_denominator(1001)
        self.frames = self.checksum = self._fragments = 0
        self.header = b""
        self._end = 0  # of the last whole fragment; 0 = nothing there that is kept
        self._shape: tuple[int, ...] | None = None
        self._file: BinaryIO | None = None

    @classmethod
    def resume(cls, path: str | Path, fps: float, frames: int, checksum: int | None = None) -> VideoWriter:
        """Continue a video of a VideoWriter; the first `write` replaces what comes after the frames that are kept.

        Args:
            path: of the video.
            fps: frames per second.
            frames: how many of its frames are kept.
            checksum: the attribute of the writer when it had written them, which makes sure that it is that video.

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

    @property
    def mark(self) -> dict[str, str]:
        """What a state keeps of the video, so that both go on together."""
        return {"video_frames": str(self.frames), "video_checksum": str(self.checksum)}

    @property
    def codec(self) -> str:
        """The codec as browsers and playlists name it (RFC 6381), "avc1.640028" for example; known after `write`."""
        record = self.header.index(b"avcC") + 4  # version, then profile, compatibility and level
        return f"avc1.{self.header[record + 1 : record + 4].hex().upper()}"

    def write(self, frames: np.ndarray) -> bytes:
        """Append frames, and flush.

        Args:
            frames: uint8 [T, H, W, 3] with T >= 1. An odd H or W grows by one: its last row or column is repeated.

        Returns:
            The bytes that were appended: the fragments of these frames.

        Raises:
            MemFlowError: the disk is full or the like; what was written before stays playable.
        """
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
            raise ValueError(f"frames must be uint8 [T, H, W, 3], got {frames.dtype} {list(frames.shape)}")
        if self._shape not in (None, frames.shape[1:]):
            raise ValueError(f"frames must be {list(self._shape)} as before, got {list(frames.shape[1:])}")
        header, added, fragments = self._encode(frames)
        if self.header and self.header != header:
            raise MemFlowError(f"{self.path}: has another frame size or rate than the frames that are to follow")
        self.header, self._shape = header, frames.shape[1:]
        try:
            if self.path is not None:
                self._append(added, self.frames + len(frames))
        except OSError as error:
            raise MemFlowError(f"{self.path}: cannot be written: {error.strerror}") from None
        self.frames += len(frames)
        self._fragments += fragments
        self.checksum = zlib.crc32(added, self.checksum)
        return added

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
        header = _read_header(file)
        field = _duration_field(header)
        if field is None:
            raise MemFlowError(f"{self.path}: not a video that memflow wrote, it cannot be continued")
        self.header = header[: field.start] + bytes(8) + header[field.stop :]
        self._end = len(header)
        for start, end, count in _fragments(file, self._end):
            if self.frames >= frames:
                break
            file.seek(start)
            self.checksum = zlib.crc32(file.read(end - start), self.checksum)
            self.frames += count
            self._fragments += 1
            self._end = end

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
        header = _read_header(file)
        added = file.getvalue()[len(header) :]
        return _with_duration_box(header), added, sum(1 for _ in _fragments(file, len(header)))

    def _append(self, added: bytes, frames: int) -> None:
        """Write fragments that bring the file to `frames` frames, then its new duration: readable after each step."""
        if self._file is None:  # unbuffered: what could not be written must not be tried again when it is closed
            self._file = open(self.path, "r+b" if self._end else "wb", buffering=0)  # noqa: SIM115 (close() closes it)
        try:
            self._file.truncate(self._end)
            if not self._end:
                self._write_at(0, self.header)
                self._end = len(self.header)
            # Whoever kills the process now leaves a box of padding up to the end of the file, which readers skip ...
            self._write_at(self._end, _PADDING_TO_END + added[len(_PADDING_TO_END) :])
            # ... and these eight bytes, written at once, make it a fragment.
            self._write_at(self._end, added[: len(_PADDING_TO_END)])
        except OSError:
            self._file.truncate(self._end)  # a full disk has room for something else again
            raise
        self._end += len(added)
        duration = round(frames / self.fps * _MOVIE_TIMESCALE).to_bytes(8, "big")
        self._write_at(_duration_field(self.header).start, duration)

    def _write_at(self, position: int, data: bytes) -> None:
        self._file.seek(position)
        left = memoryview(data)
        while left:
            left = left[self._file.write(left) :]


def _boxes(file: BinaryIO, start: int = 0) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start and end of the whole boxes from `start` on; ends where the file ends or the first box is cut off."""
    length = file.seek(0, os.SEEK_END)
    while start + 8 <= length:
        file.seek(start)
        head = file.read(8)
        end = start + int.from_bytes(head[:4], "big")
        if end < start + 8 or end > length:
            return
        yield head[4:], start, end
        start = end


def _read_header(file: BinaryIO) -> bytes:
    """`ftyp moov` at the beginning of `file`; empty if it begins otherwise."""
    found = [(kind, end) for (kind, _, end), _ in zip(_boxes(file), range(2), strict=False)]
    if [kind for kind, _ in found] != [b"ftyp", b"moov"]:
        return b""
    file.seek(0)
    return file.read(found[1][1])


def _fragments(file: BinaryIO, start: int) -> Iterator[tuple[int, int, int]]:
    """Start, end and frames of the whole fragments, boxes moof and mdat, from `start` on."""
    moof = None
    for kind, begin, end in _boxes(file, start):
        if kind == b"moof":
            file.seek(begin)
            content = file.read(end - begin)
            run = content.find(b"trun")  # one track, one run
            moof = (begin, int.from_bytes(content[run + 8 : run + 12], "big")) if run >= 0 else None
        elif kind == b"mdat" and moof is not None:
            yield moof[0], end, moof[1]
            moof = None
        else:
            return


def _with_duration_box(header: bytes) -> bytes:
    """`ftyp moov` with an `mehd` box, of duration 0, put in front of moov/mvex/trex."""
    header = bytearray(header)
    moov = int.from_bytes(header[:4], "big")
    mvex = header.rindex(b"mvex") - 4
    for box in (moov, mvex):
        header[box : box + 4] = (int.from_bytes(header[box : box + 4], "big") + len(_MEHD)).to_bytes(4, "big")
    header[mvex + 8 : mvex + 8] = _MEHD
    return bytes(header)


def _duration_field(header: bytes) -> slice | None:
    """Where in `header` the eight bytes of the total duration are; None if it has no `mehd` box as written here."""
    at = header.rfind(b"mvex" + _MEHD[:12]) + len(b"mvex")
    return None if at < len(b"mvex") else slice(at + 12, at + 20)

"""The few boxes of a fragmented MP4 (ISO/IEC 14496-12) that have to be read and written by hand.

A file is `ftyp moov`, the header, and then `moof mdat` per fragment. The muxer leaves out the total duration, which it
cannot know; `mehd`, the box for it, is inserted here at the size it needs and filled in as the file grows.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

MOVIE_TIMESCALE = 1000  # units per second of durations in the header, as libavformat writes it
PADDING_TO_END = bytes(4) + b"free"  # the head of a box of padding; size 0 = up to the end of the file
_MEHD = (20).to_bytes(4, "big") + b"mehd" + bytes([1, 0, 0, 0]) + bytes(8)  # version 1: 64 bits of duration, 0 here


class Fragment(NamedTuple):
    """Bytes `start` to `end` of a file, the boxes moof and mdat with `frames` frames."""

    start: int
    end: int
    frames: int


def boxes(file: BinaryIO, start: int = 0) -> Iterator[tuple[bytes, int, int]]:
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


def read_header(file: BinaryIO) -> bytes:
    """`ftyp moov` at the beginning of `file`; empty if it begins otherwise."""
    found = [(kind, end) for (kind, _, end), _ in zip(boxes(file), range(2), strict=False)]
    if [kind for kind, _ in found] != [b"ftyp", b"moov"]:
        return b""
    file.seek(0)
    return file.read(found[1][1])


def fragments(file: BinaryIO, start: int) -> Iterator[Fragment]:
    """The whole fragments from `start` on."""
    moof = None
    for kind, begin, end in boxes(file, start):
        if kind == b"moof":
            file.seek(begin)
            moof = (begin, _frames(file.read(end - begin)))
        elif kind == b"mdat" and moof is not None:
            yield Fragment(moof[0], end, moof[1])
            moof = None
        else:
            return


def with_duration_box(header: bytes) -> bytes:
    """`ftyp moov` with an `mehd` box, of duration 0, put in front of moov/mvex/trex."""
    header = bytearray(header)
    moov = int.from_bytes(header[:4], "big")
    mvex = header.rindex(b"mvex") - 4
    for box in (moov, mvex):
        header[box : box + 4] = (int.from_bytes(header[box : box + 4], "big") + len(_MEHD)).to_bytes(4, "big")
    header[mvex + 8 : mvex + 8] = _MEHD
    return bytes(header)


def duration_field(header: bytes) -> slice | None:
    """Where in `header` the eight bytes of the total duration are; None if it has no `mehd` box of version 1."""
    at = header.rfind(_MEHD[:12])
    return None if at < 0 else slice(at + 12, at + 20)


def _frames(moof: bytes) -> int:
    run = moof.index(b"trun")  # one track, one run
    return int.from_bytes(moof[run + 8 : run + 12], "big")

"""The video: readable after every write, and the same however often it was interrupted."""

import random
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from films import clip, decode

from memflow.errors import MemFlowError
from memflow.output.video import VideoWriter


def write(path, numbers, fps=16, **shape):
    with VideoWriter(path, fps) as video:
        for number in numbers:
            video.write(clip(number, **shape))
    return video


@pytest.mark.parametrize("fps", [16, 15.984, Fraction(24000, 1001)])
def test_a_reader_sees_rate_duration_and_every_frame(tmp_path, fps):
    video = write(tmp_path / "a.mp4", range(5), fps)
    with av.open(str(tmp_path / "a.mp4")) as file:
        stream = file.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert abs(stream.average_rate - Fraction(fps)) < 0.001
        assert abs(file.duration / av.time_base - 60 / fps) < 0.002
        times = [frame.pts * stream.time_base for frame in file.decode(stream)]
    assert len(times) == video.frames == 60
    steps = np.diff([float(time) for time in times])
    assert times[0] == 0 and np.allclose(steps, float(1 / fps), atol=1e-4)


def test_the_header_states_the_duration(tmp_path):
    # For readers that do not walk through all fragments: mvex/mehd, in milliseconds.
    write(tmp_path / "a.mp4", range(5))
    data = (tmp_path / "a.mp4").read_bytes()
    field = data.index(b"mehd") + 8
    assert int.from_bytes(data[field : field + 8], "big") == 60 * 1000 // 16


def test_pictures_and_colours_survive(tmp_path):
    write(tmp_path / "a.mp4", [3])
    error = decode(tmp_path / "a.mp4").astype(int) - clip(3)
    assert np.abs(error).mean() < 6  # half the colour resolution of steep gradients is lost
    flat = np.broadcast_to(np.array([200, 40, 90], np.uint8), (12, 48, 64, 3))
    with VideoWriter(tmp_path / "flat.mp4", 16) as video:
        video.write(flat)
    assert np.abs(decode(tmp_path / "flat.mp4").astype(int) - flat).max() <= 3


@pytest.mark.parametrize(("height", "width"), [(47, 64), (48, 63), (47, 63), (1, 1)])
def test_odd_sizes_grow_by_their_last_row_and_column(tmp_path, height, width):
    write(tmp_path / "a.mp4", [1], height=height, width=width)
    frames = decode(tmp_path / "a.mp4")
    assert frames.shape == (12, height + height % 2, width + width % 2, 3)
    assert np.abs(frames[:, :height, :width].astype(int) - clip(1, height=height, width=width)).mean() < 8


def test_every_chunk_can_be_seen_as_soon_as_it_is_written(tmp_path):
    with VideoWriter(tmp_path / "a.mp4", 16) as video:
        for number in range(4):
            video.write(clip(number, frames=9 if number == 0 else 12))
            assert len(decode(tmp_path / "a.mp4")) == video.frames == 9 + 12 * number


def test_a_long_clip_in_one_write(tmp_path):
    write(tmp_path / "a.mp4", [1], frames=600, height=16, width=16)
    assert len(decode(tmp_path / "a.mp4")) == 600
    video = VideoWriter.resume(tmp_path / "a.mp4", 16, 600)
    with video:
        video.write(clip(2, height=16, width=16))
    assert len(decode(tmp_path / "a.mp4")) == 612


@pytest.mark.parametrize("kept", [1, 7, 12])
def test_resumed_equals_uninterrupted(tmp_path, kept):
    write(tmp_path / "whole.mp4", range(12))
    first = write(tmp_path / "parts.mp4", range(kept))
    with VideoWriter.resume(tmp_path / "parts.mp4", 16, first.frames, first.checksum) as video:
        for number in range(kept, 12):
            video.write(clip(number))
    assert (tmp_path / "parts.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()
    assert np.array_equal(decode(tmp_path / "parts.mp4"), decode(tmp_path / "whole.mp4"))


@pytest.mark.parametrize("times", [60, pytest.param(3000, marks=pytest.mark.slow)])
def test_the_same_frames_are_the_same_bytes_whatever_lay_in_memory(times):
    """x264's macroblock tree looks at memory that it never wrote: five to ten of a thousand such clips differed."""
    draw, lying, found = random.Random(0), [], set()
    for _ in range(times):
        with VideoWriter(None, 16) as video:
            found.add(video.write(clip(0)))
        lying.append(draw.randbytes(draw.randint(1, 200_000)))
        if len(lying) > 50:
            lying.pop(draw.randrange(50))
    assert len(found) == 1


def test_resumed_in_another_process_equals_uninterrupted(tmp_path):
    write(tmp_path / "whole.mp4", range(6))
    first = write(tmp_path / "parts.mp4", range(3))
    code = f"""
from films import clip
from memflow.output.video import VideoWriter
with VideoWriter.resume({str(tmp_path / "parts.mp4")!r}, 16, {first.frames}, {first.checksum}) as video:
    for number in range(3, 6):
        video.write(clip(number))
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
    assert (tmp_path / "parts.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()


def test_what_follows_the_kept_frames_is_replaced_by_the_next_write(tmp_path):
    path = tmp_path / "a.mp4"
    write(path, range(6))
    path.write_bytes(path.read_bytes() + b"\x00\x00\x01\x00moof and no more")  # as a killed process leaves it
    assert len(decode(path)) == 72
    before = path.read_bytes()
    with VideoWriter.resume(path, 16, 36) as video:
        assert path.read_bytes() == before, "nothing goes before something new is there"
        for number in range(3, 6):
            video.write(clip(number))
    write(tmp_path / "whole.mp4", range(6))
    assert path.read_bytes() == (tmp_path / "whole.mp4").read_bytes()


class Dying:
    """A file whose process is killed after `count` more bytes have been written."""

    def __init__(self, file, count):
        self.file, self.count = file, count

    def write(self, data):
        self.file.write(data[: self.count])
        self.count -= len(data)
        if self.count < 0:
            raise KeyboardInterrupt
        return len(data)

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("count", [0, 7, 8, 9, 200, 1500])
def test_a_process_killed_in_the_middle_of_a_write_leaves_what_was_before(tmp_path, count):
    path = tmp_path / "a.mp4"
    with VideoWriter(path, 16) as video:
        for number in range(3):
            video.write(clip(number))
        whole = decode(path)
        video._file = Dying(video._file, count)
        with pytest.raises(KeyboardInterrupt):
            video.write(clip(3))
    assert np.array_equal(decode(path), whole)
    with VideoWriter.resume(path, 16, 36, video.checksum) as resumed:
        resumed.write(clip(3))
    write(tmp_path / "whole.mp4", range(4))
    assert path.read_bytes() == (tmp_path / "whole.mp4").read_bytes()


def test_only_the_video_that_was_interrupted_is_continued(tmp_path):
    path = tmp_path / "a.mp4"
    video = write(path, range(3))
    other = write(tmp_path / "b.mp4", range(1, 4))
    cases = [
        ({"frames": 48}, "has 36 whole frames, 48 are needed"),
        ({"frames": 30}, "its first 30 frames are not those"),
        ({"frames": 36, "checksum": other.checksum}, "its first 36 frames are not those"),
    ]
    for arguments, message in cases:
        with pytest.raises(MemFlowError, match=message):
            VideoWriter.resume(path, 16, **arguments)
    for fps, shape in ((24, {}), (16, {"width": 80})):
        with (
            pytest.raises(MemFlowError, match="another frame size or rate"),
            VideoWriter.resume(path, fps, video.frames) as resumed,
        ):
            resumed.write(clip(4, **shape))
    assert len(decode(path)) == 36


def test_a_foreign_file_is_not_continued(tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=16, width=64, height=48, pix_fmt="yuv420p")
        file.mux(stream.encode(av.VideoFrame.from_ndarray(clip(1)[0], format="rgb24")))
        file.mux(stream.encode(None))
    for content in (path.read_bytes(), b"", b"no video at all, but long enough to hold a box"):
        path.write_bytes(content)
        with pytest.raises(MemFlowError, match="not a video that memflow wrote"):
            VideoWriter.resume(path, 16, 1)
        assert path.read_bytes() == content


def test_an_older_file_stays_until_the_first_frames_are_there(tmp_path):
    path = tmp_path / "a.mp4"
    write(path, range(2))
    before = path.read_bytes()
    with VideoWriter(path, 16) as video:
        assert path.read_bytes() == before
        video.write(clip(5))
    assert len(decode(path)) == 12
    with VideoWriter(tmp_path / "never.mp4", 16):
        pass
    assert not (tmp_path / "never.mp4").exists()


def test_a_path_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.mp4").mkdir()
    cases = {
        tmp_path / "none" / "a.mp4": "does not exist",
        tmp_path / "file" / "a.mp4": "cannot be written: Not a directory",
        tmp_path / "folder.mp4": "is a folder",
        tmp_path / "a.gif": "only .mp4",
        tmp_path / "a": "only .mp4",
    }
    for path, message in cases.items():
        with pytest.raises(MemFlowError, match=message) as error:
            VideoWriter(path, 16)
        assert str(path) in str(error.value)


FULL = """
import resource, sys
from films import clip
from memflow.output.video import VideoWriter
with VideoWriter(sys.argv[1], 16) as video:
    video.write(clip(0))
    room = video._end + 1000
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    for _ in range(2):
        try:
            video.write(clip(1))
        except ValueError as error:
            print(video.frames, error)
"""


def test_a_full_disk_is_said_and_the_frames_before_it_stay(tmp_path):
    """The file may not grow beyond 1,000 bytes more, in a process of its own."""
    path = tmp_path / "a.mp4"
    environment = {"PYTHONPATH": ":".join([str(Path(__file__).parent), *sys.path])}
    code = [sys.executable, "-c", FULL, str(path)]
    result = subprocess.run(code, capture_output=True, text=True, env=environment)
    assert (result.returncode, result.stderr) == (0, ""), result.stderr
    assert result.stdout == f"12 {path}: cannot be written: File too large\n" * 2
    write(tmp_path / "b.mp4", [0])
    assert path.read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_without_a_file_the_bytes_are_those_of_the_file(tmp_path):
    write(tmp_path / "a.mp4", range(3))
    video = VideoWriter(None, 16)
    sent = [video.write(clip(number)) for number in range(3)]
    content = (tmp_path / "a.mp4").read_bytes()
    assert content[len(video.header) :] == b"".join(sent)
    field = content.index(b"mehd") + 8
    assert content[: len(video.header)] == video.header[:field] + content[field : field + 8] + video.header[field + 8 :]
    (tmp_path / "sent.mp4").write_bytes(video.header + b"".join(sent))
    assert np.array_equal(decode(tmp_path / "sent.mp4"), decode(tmp_path / "a.mp4"))
    with av.open(str(tmp_path / "a.mp4")) as file:
        context = file.streams.video[0].codec_context
    high = {"High": "64", "Main": "4D", "Constrained Baseline": "42"}[context.profile]
    assert video.codec.startswith(f"avc1.{high}") and len(video.codec) == 11


@pytest.mark.parametrize(
    "frames",
    [np.zeros((4, 48, 64, 3), np.float32), np.zeros((48, 64, 3), np.uint8), np.zeros((0, 48, 64, 3), np.uint8)],
    ids=["float", "one picture", "none"],
)
def test_frames_of_another_form_are_refused(tmp_path, frames):
    with VideoWriter(tmp_path / "a.mp4", 16) as video, pytest.raises(ValueError, match="uint8"):
        video.write(frames)


def test_a_change_of_size_is_refused(tmp_path):
    with VideoWriter(tmp_path / "a.mp4", 16) as video:
        video.write(clip(0))
        with pytest.raises(ValueError, match=r"must be \[48, 64, 3\]"):
            video.write(clip(0, width=80))

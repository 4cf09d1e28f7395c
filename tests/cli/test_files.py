"""Files as they will be used: links are written through, odd files and long names refused, what is not ours is kept."""

import os
import struct
import warnings
import zlib
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from films import NOISE, clip, decode
from PIL import Image, PngImagePlugin

from memflow.cli import main
from memflow.cli.options import Request
from memflow.cli.story import jobs
from memflow.errors import MemFlowError
from memflow.output.report import MemoryReport
from memflow.output.video import VideoWriter

TINY = ["-p", "a fox", "--model", NOISE, "--height", "32", "--width", "32", "--device", "cpu", "--chunks", "1"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(message, **options):
    """What `memflow generate` says of these options before it loads anything; the folder is as it was."""
    before = sorted(Path().rglob("*"))
    paths = {name: Path(value) if name in PATHS else value for name, value in options.items()}
    with pytest.raises(MemFlowError, match=message) as error:
        jobs(Request(**({"output": Path("a.mp4"), "prompts": ["a fox"]} | paths)))
    assert sorted(Path().rglob("*")) == before
    return str(error.value)


PATHS = ("output", "save_state", "story", "resume", "decoder")
WRITTEN = {"output": "a.mp4", "save_state": "s.state"}
READ = {"story": {"prompts": None}, "resume": {"prompts": None}, "decoder": {}}


def test_what_is_written_goes_through_links():
    Path("big").mkdir()
    for name in ("a.mp4", "a.png", "s.state"):
        Path(name).symlink_to(Path("big") / name)
    assert main(["generate", *TINY, "-o", "a.mp4", "--report", "--save-state", "s.state"]) == 0
    assert all(Path(name).is_symlink() and Path(name).stat().st_size > 1000 for name in ("a.mp4", "a.png", "s.state"))
    assert len(decode("a.mp4")) == 12
    # Once more onto what is there now, by other links to the same files.
    Path("again").symlink_to("s.state")
    assert main(["generate", *TINY, "-o", "a.mp4", "--save-state", "again"]) == 0
    assert Path("again").is_symlink() and Path("s.state").is_symlink()


def test_a_refused_request_leaves_dangling_links_alone(capsys):
    for name in ("a.mp4", "a.png", "s.state"):
        Path(name).symlink_to(Path(f"not-there-{name}"))
    before = sorted(Path().iterdir())
    assert main(["generate", *TINY[:2], "--model", "none", "-o", "a.mp4", "--report", "--save-state", "s.state"]) == 2
    assert "none" in capsys.readouterr().err
    assert sorted(Path().iterdir()) == before and all(path.is_symlink() for path in before)


def test_a_link_that_goes_in_a_circle_or_into_no_folder():
    Path("a.mp4").symlink_to("b.mp4")
    Path("b.mp4").symlink_to("a.mp4")
    assert refused("cannot be written").startswith("a.mp4: ")
    Path("c.mp4").symlink_to("none/c.mp4")
    refused("the folder", output="c.mp4")


def test_two_names_of_one_file_are_one_file():
    Path("link.state").symlink_to("a.mp4")
    refused("named twice", save_state="link.state")
    Path("a.txt").write_text("a fox")
    Path("story.mp4").symlink_to("a.txt")
    refused("named twice", output="story.mp4", story="a.txt", prompts=None)


@pytest.mark.parametrize("option", WRITTEN)
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_only_a_regular_file_is_written(option, kind):
    path = Path("x.mp4")
    {"pipe": lambda: os.mkfifo(path), "device": lambda: path.symlink_to("/dev/full"), "folder": path.mkdir}[kind]()
    assert "folder" in (said := refused("x.mp4: is", **{option: path})) or "regular file" in said


def test_a_report_is_a_regular_file_too():
    os.mkfifo("a.png")
    refused("a.png: is not a regular file", report=True)


@pytest.mark.parametrize("option", READ)
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "nothing"])
def test_only_a_regular_file_is_read(option, kind):
    path = Path("x")
    make = {"pipe": lambda: os.mkfifo(path), "device": lambda: path.symlink_to("/dev/zero"), "folder": path.mkdir}
    make.get(kind, lambda: None)()
    reason = {"folder": "is a folder", "nothing": "cannot be read"}.get(kind, "is not a regular file")
    refused(f"x: {reason}", **{option: path}, **READ[option])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("x" * 252 + ".mp4", {"output": "{}"}),
        ("猫" * 84 + ".mp4", {"output": "{}"}),
        ("x" * 256, {"save_state": "{}"}),
        ("x" * 256, {"story": "{}", "prompts": None}),
        ("x" * 256, {"resume": "{}", "prompts": None}),
        ("x" * 256, {"decoder": "{}"}),
    ],
)
def test_a_name_that_is_too_long_is_said_before_anything_is_done(name, options):
    refused("File name too long", **{key: value and value.format(name) for key, value in options.items()})


def test_the_name_of_a_story_that_is_too_long_for_a_file():
    Path("s.jsonl").write_text('{"prompts": ["a"], "name": "%s"}\n{"prompts": ["b"]}\n' % ("n" * 252))
    refused("File name too long", story="s.jsonl", prompts=None, output="new")  # and no empty folder is left
    Path("there").mkdir()
    refused("File name too long", story="s.jsonl", prompts=None, output="there")


@pytest.mark.parametrize("options", [[], ["--jobs", "1"]], ids=["one by one", "with a worker"])
def test_a_size_that_is_refused_late_leaves_no_folder(options, capsys):
    Path("s.jsonl").write_text('{"prompts": ["a"]}\n{"prompts": ["b"]}\n')
    Path("there").mkdir()
    for folder in ("new", "there"):
        command = ["generate", "s.jsonl", "-o", folder, "--height", "33", "--device", "cpu", *options]
        assert main(command) == 2 and "height must be a positive multiple" in capsys.readouterr().err
    assert sorted(Path().rglob("*")) == [Path("s.jsonl"), Path("there")]


@pytest.mark.parametrize("option", ["--model", "--preset"])
def test_the_name_of_a_model_that_is_too_long(option, capsys):
    assert main(["generate", "-p", "a", "-o", "a.mp4", option, "m" * 300]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def foreign_video():
    with av.open("a.mp4", "w", options={"movflags": "frag_keyframe+empty_moov+default_base_moof"}) as file:
        stream = file.add_stream("libx264", rate=16, width=64, height=48, pix_fmt="yuv420p")
        file.mux(stream.encode(av.VideoFrame.from_ndarray(clip(1)[0], format="rgb24")))
        file.mux(stream.encode(None))


def foreign_picture():
    Image.fromarray(clip(1)[0]).save("a.png")


def picture_larger_than_any(width=60_000, height=60_000):
    """That its first bytes say so is enough: Pillow refuses it."""
    Image.new("1", (1, 1)).save("a.png")
    content = bytearray(Path("a.png").read_bytes())
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    Path("a.png").write_bytes(content)


def picture_with_a_book():
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "x" * (PngImagePlugin.MAX_TEXT_CHUNK + 1), zip=True)
    Image.new("1", (1, 1)).save("a.png", pnginfo=text)


FOREIGN = {
    "a video": (foreign_video, "a.mp4", {}),
    "a text called .mp4": (lambda: Path("a.mp4").write_text("my notes"), "a.mp4", {}),
    "a picture": (foreign_picture, "a.png", {"report": True}),
    "a huge picture": (picture_larger_than_any, "a.png", {"report": True}),
    "a large picture": (lambda: picture_larger_than_any(10_000, 10_000), "a.png", {"report": True}),
    "a picture with a book in it": (picture_with_a_book, "a.png", {"report": True}),
    "a text called .png": (lambda: Path("a.png").write_text("my notes"), "a.png", {"report": True}),
    "a text for a state": (lambda: Path("s").write_text("my notes"), "s", {"save_state": "s"}),
}


@pytest.mark.parametrize(("make", "path", "options"), FOREIGN.values(), ids=FOREIGN)
def test_what_memflow_did_not_make_stays(make, path, options):
    make()
    content = Path(path).read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refused(f"{path}: is there and memflow did not make it; --overwrite replaces it", **options)
    paths = {name: Path(value) if name == "save_state" else value for name, value in options.items()}
    assert len(jobs(Request(output=Path("a.mp4"), prompts=["a fox"], overwrite=True, **paths))) == 1
    assert Path(path).read_bytes() == content, "it is checked, not yet replaced"


def test_what_memflow_made_is_made_again():
    with VideoWriter("a.mp4", 16) as video:
        video.write(clip(0))
    report = MemoryReport("A story", fps=16)
    memory = SimpleNamespace(
        held=np.full((1, 1, 1), -1), relevance=np.zeros((1, 1, 1)), recalled=np.full((1, 1, 1), -1), sink=[], window=[0]
    )
    chunk = SimpleNamespace(index=0, prompts=["a"], latents=np.zeros((1, 4, 3, 6, 8)), frames=clip(0)[None])
    report.add(chunk, memory)
    report.save("a.png")
    Path("s").touch()  # nothing is lost with it
    assert jobs(Request(output=Path("a.mp4"), prompts=["a fox"], report=True, save_state=Path("s")))


def test_overwrite_without_effect_is_an_error():
    refused("--overwrite does nothing with --resume", resume="s", prompts=None, overwrite=True)
    refused("--save-state FILE", save_every=3)

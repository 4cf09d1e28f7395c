"""`memflow generate` end to end with a tiny untrained model: what it writes, and that a pause leaves no trace in it."""

import json
import re
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch
from films import NOISE, decode
from PIL import Image

from memflow import MemFlowPipeline
from memflow.cli import main
from memflow.stream.chunks import ChunkDriver
from memflow_bench.untrained import noise_pipeline

# Three prompts of four chunks: the window is full after three, so that the bank fills and then has to choose.
STORY = ["A keeper with a red scarf climbs the stairs.", "A cat on the rail, alone.", "The keeper finds the cat."]
SMALL = ["--model", NOISE, "--height", "32", "--width", "32", "--device", "cpu", "--seconds-per-prompt", "3"]
SHORT = [*SMALL[:-1], "1.5"]  # two chunks each
POLICIES = ["prompt", "fifo", "none", "published"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The toy model is too small for more, and results must not depend on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def story(tmp_path):
    path = tmp_path / "cat.jsonl"
    path.write_text(json.dumps({"prompts": STORY}))
    return path


def generate(*arguments):
    return main(["generate", *map(str, arguments)])


def test_a_story_becomes_a_video_and_its_numbers_are_told(story, tmp_path, capsys):
    assert generate(story, "-o", tmp_path / "cat.mp4", *SMALL, "--report") == 0
    frames = decode(tmp_path / "cat.mp4")
    assert frames.shape == (12 * 12, 32, 32, 3)
    output = capsys.readouterr()
    assert "144 frames, 9.0 s at 16 frames/s, 32 x 32" in output.out
    loop, whole = (float(number) for number in re.findall(r"(?:loop|all) +([\d.]+) frames/s", output.out))
    assert loop > whole > 0
    for prompt, time in zip(STORY, ("0:00", "0:03", "0:06"), strict=True):
        assert f"{time}  {prompt}" in output.err
    with Image.open(tmp_path / "cat.png") as picture:
        assert picture.width > 1000


def test_the_video_is_what_the_pipeline_makes(story, tmp_path):
    assert (
        generate("-p", STORY[0], "-o", tmp_path / "a.mp4", *SMALL, "--seed", "3", "--memory", "fifo", "--top-k", "2")
        == 0
    )
    from memflow import MemoryConfig
    from memflow.output.video import VideoWriter

    pipe = noise_pipeline()
    memory = MemoryConfig(policy="fifo", top_k=2)
    with VideoWriter(tmp_path / "b.mp4", pipe.fps) as video:
        for chunk in pipe.stream(STORY[:1], seconds_per_prompt=3, height=32, width=32, seed=3, memory=memory):
            video.write(chunk.frames[0].numpy())
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_several_stories_fill_a_folder(tmp_path, capsys):
    stories = tmp_path / "tales.jsonl"
    stories.write_text("".join(json.dumps({"prompts": [text]}) + "\n" for text in STORY[:2]))
    assert generate(stories, "-o", tmp_path / "out", *SMALL, "--chunks", "1", "--report") == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["tales-1.mp4", "tales-1.png", "tales-2.mp4", "tales-2.png"]
    first, second = (decode(tmp_path / "out" / f"tales-{n}.mp4") for n in (1, 2))
    assert len(first) == len(second) == 12 and not np.array_equal(first, second)
    assert "2/2 tales-2" in capsys.readouterr().err


def test_a_story_is_gone_before_the_next_one_begins(tmp_path, monkeypatch):
    told, alive, begin = [], [], MemFlowPipeline.stream

    def stream(*args, **settings):
        alive.append(sum(story() is not None for story in told))
        made = begin(*args, **settings)
        told.append(weakref.ref(made))
        return made

    monkeypatch.setattr(MemFlowPipeline, "stream", stream)
    stories = tmp_path / "tales.jsonl"
    stories.write_text("".join(json.dumps({"prompts": [text]}) + "\n" for text in STORY))
    assert generate(stories, "-o", tmp_path / "out", *SMALL, "--chunks", "1", "--report") == 0
    assert alive == [0, 0, 0]


@pytest.mark.filterwarnings("error::FutureWarning")
def test_a_damaged_model_is_named(story, tmp_path, capsys):
    noise_pipeline().save_pretrained(tmp_path / "model")
    for weights in (tmp_path / "model" / "transformer").glob("*.safetensors"):
        weights.write_bytes(b"nothing")
    assert generate(story, "-o", tmp_path / "a.mp4", "--model", tmp_path / "model") == 2
    error = capsys.readouterr().err
    assert f"--model {tmp_path / 'model'}: cannot be loaded" in error and "Traceback" not in error


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_number_formats(story, tmp_path, dtype):
    assert generate(story, "-o", tmp_path / "a.mp4", *SMALL, "--chunks", "1", "--dtype", dtype) == 0
    assert len(decode(tmp_path / "a.mp4")) == 12


def test_nan_stops_with_a_message_and_keeps_the_video(story, tmp_path, capsys, monkeypatch):
    calls, denoise = [], ChunkDriver.denoise

    def poisoned(*arguments):
        calls.append(1)
        return denoise(*arguments) * (float("nan") if len(calls) == 10 else 1)

    monkeypatch.setattr(ChunkDriver, "denoise", poisoned)
    state = tmp_path / "a.state"
    assert generate(story, "-o", tmp_path / "a.mp4", *SMALL, "--save-state", state) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "NaN" in last and f"{tmp_path / 'a.mp4'} keeps the 24 frames made before" in last
    assert len(decode(tmp_path / "a.mp4")) == 24
    assert not state.exists()


def test_every_policy_resumes_to_the_same_video_in_another_process(story, tmp_path):
    """Chunk 7 is in the middle of the second prompt; the third begins after the pause."""
    rest = []
    for policy in POLICIES:
        whole, parts, state = (tmp_path / f"{policy}-{name}" for name in ("whole.mp4", "parts.mp4", "state"))
        settings = [*SMALL, "--memory", policy, "--seed", "5"]
        assert generate(story, "-o", whole, *settings) == 0
        assert generate(story, "-o", parts, *settings, "--chunks", "7", "--save-state", state) == 0
        assert len(decode(parts)) == 7 * 12
        rest.append(["generate", "--resume", str(state), "-o", str(parts)])
    rest[0].append("--report")
    code = "import memflow_bench.untrained; from memflow.cli import main\n"
    code += f"assert [main(arguments) for arguments in {rest!r}] == [0] * {len(rest)}"
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={"OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(sys.path)}
    )
    videos = []
    for policy in POLICIES:
        whole, parts = tmp_path / f"{policy}-whole.mp4", tmp_path / f"{policy}-parts.mp4"
        videos.append(decode(whole))
        assert np.array_equal(decode(parts), videos[-1]), policy
        assert parts.read_bytes() == whole.read_bytes(), policy
    assert (tmp_path / "prompt-parts.png").exists()
    assert all(not np.array_equal(videos[0], other) for other in videos[1:]), "the policies make no difference here"


def test_paused_twice_and_once_at_a_switch(story, tmp_path):
    whole, parts = tmp_path / "whole.mp4", tmp_path / "parts.mp4"
    assert generate(story, "-o", whole, *SHORT) == 0
    assert generate(story, "-o", parts, *SHORT, "--chunks", "2", "--save-state", tmp_path / "s1") == 0
    assert generate("--resume", tmp_path / "s1", "-o", parts, "--chunks", "2", "--save-state", tmp_path / "s2") == 0
    assert generate("--resume", tmp_path / "s2", "-o", parts, "--save-state", tmp_path / "s3") == 0
    assert parts.read_bytes() == whole.read_bytes()
    # From the first pause once more: what was made after it is made again.
    assert generate("--resume", tmp_path / "s1", "-o", parts) == 0
    assert parts.read_bytes() == whole.read_bytes()


def test_the_rest_alone_where_the_first_part_is_not_there(story, tmp_path, capsys):
    whole, rest, state = tmp_path / "whole.mp4", tmp_path / "rest.mp4", tmp_path / "state"
    assert generate(story, "-o", whole, *SHORT) == 0
    assert generate(story, "-o", tmp_path / "first.mp4", *SHORT, "--chunks", "3", "--save-state", state) == 0
    capsys.readouterr()
    assert generate("--resume", state, "-o", rest, "--chunks", "2", "--save-state", state) == 0
    assert "it will hold the rest alone, from chunk 4 on" in capsys.readouterr().err
    assert generate("--resume", state, "-o", rest) == 0
    assert np.array_equal(decode(rest), decode(whole)[3 * 12 :])


def test_another_video_is_not_continued(story, tmp_path, capsys):
    state, other = tmp_path / "state", tmp_path / "other.mp4"
    assert generate(story, "-o", tmp_path / "a.mp4", *SMALL, "--chunks", "2", "--save-state", state) == 0
    assert generate(story, "-o", other, *SMALL, "--chunks", "3", "--seed", "1") == 0
    before = other.read_bytes()
    capsys.readouterr()
    assert generate("--resume", state, "-o", other) == 2
    assert "its first 24 frames are not those that are to be continued" in capsys.readouterr().err
    assert other.read_bytes() == before


def test_a_story_that_is_told_has_no_rest(story, tmp_path, capsys):
    state = tmp_path / "state"
    assert generate(story, "-o", tmp_path / "a.mp4", *SHORT, "--save-state", state) == 0
    assert "state  " in capsys.readouterr().out
    assert generate("--resume", state, "-o", tmp_path / "a.mp4") == 2
    assert "nothing is left to generate" in capsys.readouterr().err


def test_a_state_of_the_python_interface_is_refused_with_the_reason(tmp_path, capsys):
    told = noise_pipeline().stream(STORY, seconds_per_prompt=1, height=32, width=32)
    next(told)
    told.save(tmp_path / "state")
    assert generate("--resume", tmp_path / "state", "-o", tmp_path / "a.mp4") == 2
    assert "not saved by `memflow generate`" in capsys.readouterr().err

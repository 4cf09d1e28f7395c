"""Streams as a user runs them: steering, batches, saving and resuming, what they refuse."""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from memflow.decoders.taehv import TinyVideoDecoder
from memflow.errors import MemFlowError
from memflow.memory import MemoryConfig
from memflow.models.wan.attention import uninstall
from memflow_bench.untrained import noise_pipeline

STORY = ["a red boat leaves the harbour", "an owl looks down from the lighthouse"]
MEMORIES = {
    "prompt": MemoryConfig(),
    "softmax": MemoryConfig(aggregate="softmax", window_frames=6, bank_frames=2),
    "fifo": MemoryConfig(policy="fifo", top_k=2),
    "none": MemoryConfig(policy="none"),
    "published": MemoryConfig.published(record_interval=1),
    "published, no global sink": MemoryConfig.published("single", top_k=3, global_sink=False),
}
CHUNK_SECONDS = 0.75


def video(stream) -> torch.Tensor:
    return torch.cat([chunk.frames for chunk in stream], dim=1)


def test_chunks(toy):
    stream = toy.stream(STORY, seconds_per_prompt=2 * CHUNK_SECONDS)
    assert len(stream) == 4
    chunks = list(stream)
    assert stream.position == len(stream) == 4
    assert [chunk.start_frame for chunk in chunks] == [0, 3, 6, 9]
    assert [chunk.switched for chunk in chunks] == [True, False, True, False]
    assert [chunk.prompts for chunk in chunks] == [[STORY[0]]] * 2 + [[STORY[1]]] * 2
    for chunk in chunks:
        assert chunk.frames.shape == (1, toy.frames_per_chunk, toy.config.height, toy.config.width, 3)
        assert chunk.frames.dtype == torch.uint8
    assert all(seconds > 0 for seconds in stream.timings.values())


def test_call_gives_the_whole_video(toy):
    result = toy(STORY, seconds_per_prompt=CHUNK_SECONDS, seed=3)
    assert torch.equal(result.frames, video(toy.stream(STORY, seconds_per_prompt=CHUNK_SECONDS, seed=3)))
    assert result.latents.shape[2] == 6


def test_prompt_and_seed_matter(toy):
    def told(prompt, seed):
        return video(toy.stream([prompt], seconds_per_prompt=CHUNK_SECONDS, seed=seed))

    assert torch.equal(told("a", 0), told("a", 0))
    assert not torch.equal(told("a", 0), told("b", 0))
    assert not torch.equal(told("a", 0), told("a", 1))


def test_rows_of_a_batch_are_the_single_stories(toy):
    other = ["a fox in the snow", "the fox sleeps"]
    batch = toy.stream(list(zip(STORY, other, strict=True)), seconds_per_prompt=3 * CHUNK_SECONDS, seed=5)
    latents = torch.cat([chunk.latents for chunk in batch], dim=2)
    for row, story in enumerate((STORY, other)):
        single = toy.stream(story, seconds_per_prompt=3 * CHUNK_SECONDS, seed=5 + row)
        alone = torch.cat([chunk.latents for chunk in single], dim=2)
        torch.testing.assert_close(latents[row : row + 1], alone, rtol=1e-4, atol=1e-4)


def test_two_streams_can_take_turns(toy):
    settings = {"seconds_per_prompt": 2 * CHUNK_SECONDS}
    alone = [video(toy.stream(STORY, seed=seed, **settings)) for seed in (0, 1)]
    streams = [toy.stream(STORY, seed=seed, **settings) for seed in (0, 1)]
    frames = [[], []]
    for _ in range(4):
        for stream, made in zip(streams, frames, strict=True):
            made.append(next(stream).frames)
    for made, expected in zip(frames, alone, strict=True):
        assert torch.equal(torch.cat(made, dim=1), expected)


def test_send_is_the_same_as_a_planned_switch(toy):
    planned = video(toy.stream(STORY, seconds_per_prompt=2 * CHUNK_SECONDS))
    stream = toy.stream(STORY[:1], seconds_per_prompt=2 * CHUNK_SECONDS)
    frames = [next(stream).frames, next(stream).frames]
    stream.send(STORY[1])
    frames += [chunk.frames for chunk in stream]
    assert torch.equal(torch.cat(frames, dim=1), planned)


@pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES)
def test_resume_is_bit_identical(toy, memory, tmp_path):
    """Saved a chunk before a switch and at it, where a frame of the full bank has been replaced already."""
    settings = {"seconds_per_prompt": 8 * CHUNK_SECONDS, "memory": memory, "height": 32, "width": 32}
    whole = video(toy.stream(STORY, **settings))
    stream = toy.stream(STORY, **settings)
    made = [next(stream).frames for _ in range(7)]
    stream.save(tmp_path / "across", extra={"title": "boat"})
    made.append(next(stream).frames)
    stream.save(tmp_path / "at", extra={"title": "boat"})
    assert torch.equal(torch.cat([*made, video(stream)], dim=1), whole), "saving disturbed the stream"
    for name, saved_at in (("across", 7), ("at", 8)):
        resumed = toy.resume(tmp_path / name)
        assert (resumed.position, len(resumed), resumed.extra) == (saved_at, 16, {"title": "boat"})
        assert torch.equal(torch.cat([*made[:saved_at], video(resumed)], dim=1), whole)


def test_resume_in_a_new_process(toy, tmp_path):
    stream = toy.stream(STORY, seconds_per_prompt=8 * CHUNK_SECONDS)
    for _ in range(7):
        next(stream)
    stream.save(tmp_path / "state.safetensors")
    code = (
        "import sys, torch; from memflow_bench.untrained import noise_pipeline\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        "stream = noise_pipeline().resume(sys.argv[1])\n"
        "torch.save(torch.cat([chunk.frames for chunk in stream], dim=1), sys.argv[2])\n"
    )
    subprocess.run(
        [sys.executable, "-c", code, tmp_path / "state.safetensors", tmp_path / "rest.pt"], check=True, timeout=300
    )
    assert torch.equal(torch.load(tmp_path / "rest.pt"), video(stream))


def test_save_and_load_the_pipeline(toy, tmp_path):
    toy.save_pretrained(tmp_path)
    for name in ("transformer", "text_encoder", "vae"):
        loaded = getattr(type(toy).from_pretrained(tmp_path), name).state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in getattr(toy, name).state_dict().items())
    again = type(toy).from_pretrained(tmp_path)
    settings = {"seconds_per_prompt": CHUNK_SECONDS}
    # Weights read from a file lie at other addresses, so that their products may be summed in another order.
    for loaded, built in zip(again.stream(STORY, **settings), toy.stream(STORY, **settings), strict=True):
        torch.testing.assert_close(loaded.latents, built.latents, rtol=0, atol=1e-4)
    assert (again.config.text_length, again.memory_config) == (toy.config.text_length, toy.memory_config)


def test_far_beyond_1024_latent_frames(toy):
    """Attention depends on distances alone: a story that begins at frame 120,000 is the one that begins at 0."""
    memory = MemoryConfig(policy="none", sink_frames=0)
    near, far = (toy.stream(STORY[:1], seconds_per_prompt=3 * CHUNK_SECONDS, memory=memory) for _ in range(2))
    shift = 120_000 * memory.window_frames
    slots = far.memory.pass_over

    def shifted(start, frames, prompt):
        step = slots(start, frames, prompt)
        return step._replace(start_frame=step.start_frame + shift)

    far.memory.pass_over = shifted
    for a, b in zip(near, far, strict=True):
        torch.testing.assert_close(a.latents, b.latents, rtol=0, atol=1e-4)


@pytest.mark.parametrize("held", [None, 4])
def test_a_snapshot_stays_what_it_was(toy, held):
    """On a CPU its arrays could be the memory's own, which the next chunk writes into."""
    stream = toy.stream(["bo"], memory=replace(toy.memory_config, bank_frames=2, policy="fifo", held_frames=held))
    snapshots, copies = [], []
    for _ in range(9):
        next(stream)
        snapshots.append(stream.snapshot())
        copies.append(copy.deepcopy(snapshots[-1]))
    for snapshot, then in zip(snapshots, copies, strict=True):
        assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(snapshot[:3], then[:3], strict=True))


def test_snapshot(toy):
    stream = toy.stream(STORY, seconds_per_prompt=4 * CHUNK_SECONDS)
    with pytest.raises(MemFlowError, match="no chunk has been kept"):
        stream.snapshot()
    for _ in stream:
        pass
    snapshot = stream.snapshot()
    assert snapshot.sink == [0, 1, 2]
    assert snapshot.window == list(range(15, 24))
    assert snapshot.held.shape == snapshot.relevance.shape == (4, 1, 3)
    assert {frame for frame in snapshot.held.flatten() if frame >= 0} <= set(range(3, 15, 3))
    assert ((snapshot.held < 0) == ~torch.isfinite(torch.from_numpy(snapshot.relevance)).numpy()).all()


def test_uninstall_gives_the_transformer_back(toy):
    pipeline = noise_pipeline()
    before = [type(p) for p in pipeline.transformer.attn_processors.values()]
    next(pipeline.stream(STORY))
    latents = torch.zeros(1, pipeline.transformer.config.in_channels, 1, 16, 16)
    text = torch.zeros(1, 4, pipeline.transformer.config.text_dim)
    with pytest.raises(MemFlowError, match="uninstall"):
        pipeline.transformer(latents, torch.zeros(1), text)
    uninstall(pipeline.transformer)
    assert [type(p) for p in pipeline.transformer.attn_processors.values()] == before
    pipeline.transformer(latents, torch.zeros(1), text)


def test_nan_latents_are_reported(toy):
    stream = toy.stream(STORY, seconds_per_prompt=2 * CHUNK_SECONDS)
    next(stream)
    stream.noise = lambda shape: torch.full((1, *shape), float("nan"))
    with pytest.raises(MemFlowError, match="chunk 1: the latents contain NaN"):
        next(stream)
    with pytest.raises(MemFlowError, match="interrupted while it made chunk 1"):
        next(stream)
    with pytest.raises(MemFlowError, match="interrupted"):
        stream.save("never-written.safetensors")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"prompts": []}, "prompts must be a list of at least one prompt"),
        ({"prompts": "a cat"}, "prompts must be a list"),
        ({"prompts": ["a", "  "]}, "not blank"),
        ({"prompts": ["a", 3]}, "prompt must be a text that is not blank, got 3"),
        ({"prompts": [["a", "b"], ["c"]]}, "one text per story \\(2\\), got 1"),
        ({"prompts": ["a"], "seconds_per_prompt": 0}, "seconds_per_prompt must be above 0"),
        ({"prompts": ["a"], "height": 63}, "height must be a positive multiple"),
        ({"prompts": ["a"], "width": -8}, "width must be a positive multiple"),
        ({"prompts": ["a"], "height": 0}, "height must be a positive multiple"),
        ({"prompts": ["a"], "height": 64.0}, "height must be a positive multiple"),
        ({"prompts": ["a"], "width": 64 * 10**400}, "width must be at most 1,048,576 pixels"),
        ({"prompts": ["a"], "seed": [1, 2]}, "seed must be"),
        ({"prompts": ["a"], "seed": 2**63}, "seed must be a whole number from 0"),
        ({"prompts": [["a", "b"]], "seed": 2**63 - 1}, r"seed must be at most 2\*\*63 - 2"),
        ({"prompts": ["a"], "seed": 1.5}, "seed must be a whole number from 0"),
        ({"prompts": ["a"], "seconds_per_prompt": 1e300}, "seconds_per_prompt must be above 0 and at most"),
        ({"prompts": ["a"], "seconds_per_prompt": "3"}, "seconds_per_prompt must be above 0"),
        ({"prompts": ["a"], "memory": {"top_k": 3}}, "memory must be a MemoryConfig, got dict"),
        ({"prompts": [[]]}, "one text per story"),
        ({"prompts": [None]}, "not blank, got None"),
        ({"prompts": ["\ud800"]}, "prompt must be valid Unicode"),
        ({"prompts": iter(["a"])}, "prompts must be a list"),
    ],
)
def test_stream_refuses(toy, arguments, complaint):
    with pytest.raises(MemFlowError, match=complaint):
        toy.stream(**arguments)


def test_resume_refuses(toy, tmp_path):
    (tmp_path / "text").write_text("hello")
    with pytest.raises(MemFlowError, match="cannot be read as the state"):
        toy.resume(tmp_path / "text")
    with pytest.raises(MemFlowError, match="cannot be read as the state"):
        toy.resume(tmp_path / "missing")
    stream = toy.stream(STORY, seconds_per_prompt=CHUNK_SECONDS)
    next(stream)
    with pytest.raises(MemFlowError, match="cannot be written"):
        stream.save(tmp_path / "no such folder" / "state.safetensors")
    stream.save(tmp_path / "state.safetensors")
    other = noise_pipeline()
    other.register_to_config(denoising_steps=[1000, 500])
    assert len(other.schedule) == 2
    with pytest.raises(MemFlowError, match=r"saved with another model.*denoising_steps"):
        other.resume(tmp_path / "state.safetensors")
    tuned = noise_pipeline()
    tuned.transformer.blocks[0].attn1.to_q.weight.data += 1
    with pytest.raises(MemFlowError, match=r"saved with another model.*transformer"):
        tuned.resume(tmp_path / "state.safetensors")


@pytest.mark.parametrize("change", ["sigmas", "vae", "decoder"])
def test_resume_refuses_what_would_go_on_otherwise(toy, tmp_path, change, monkeypatch):
    stream = toy.stream(STORY, seconds_per_prompt=CHUNK_SECONDS)
    next(stream)
    if change == "decoder":
        monkeypatch.setattr(stream.decoder, "state_dict", lambda: {"cache.0": torch.zeros(1)})
    stream.save(tmp_path / "state.safetensors")
    other = noise_pipeline()
    if change == "sigmas":
        other.scheduler = type(other.scheduler).from_config(other.scheduler.config, shift=3.0)
    elif change == "vae":
        other.register_modules(vae=TinyVideoDecoder(latent_channels=192, channels=(8, 8, 8), grow=(2, 2)))
    complaint = (
        "is not the state of a stream of this model: PixelShuffleCodec has no decoder state"
        if change == "decoder"
        else f"saved with another model.*{change}"
    )
    with pytest.raises(MemFlowError, match=complaint):
        other.resume(tmp_path / "state.safetensors")


def test_a_transformer_that_is_busy_says_so(toy):
    stream = toy.stream(STORY, seconds_per_prompt=CHUNK_SECONDS)
    next(stream)
    step = stream.memory.pass_over(3, 3, stream.driver.in_force.prompt)
    with toy.transformer.rope.during(step), pytest.raises(MemFlowError, match="can only take turns"):
        next(toy.stream(STORY, seconds_per_prompt=CHUNK_SECONDS))


def test_a_stream_goes_on_after_uninstall(toy):
    pipeline = noise_pipeline()
    stream = pipeline.stream(STORY, seconds_per_prompt=CHUNK_SECONDS)
    first = next(stream).frames
    uninstall(pipeline.transformer)
    told = torch.cat([first, next(stream).frames], dim=1)
    assert torch.equal(told, video(toy.stream(STORY, seconds_per_prompt=CHUNK_SECONDS)))

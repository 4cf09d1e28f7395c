"""Training sees what a stream sees, reduces its loss, and goes on after a pause as if there had been none."""

import shutil

import numpy as np
import pytest
import torch

from examples.storybook import model
from examples.storybook.model import encode_frames
from examples.storybook.stories import CHUNK, training_script
from examples.storybook.train import codec_run, train
from examples.storybook.train_stories import Batch, Trainer
from examples.storybook.training_run import Muon, orthogonal
from memflow import MemFlowError, MemFlowPipeline
from memflow.decoders.independent import StorybookCodec
from memflow.memory import MemoryConfig
from memflow.memory.places import Places
from memflow.models.wan.adapter import WanModel
from memflow.models.wan.text import encode_prompts
from memflow.stream.chunks import ChunkDriver

CHUNKS, BANK = 8, 6


def test_a_chunk_sees_in_training_what_it_sees_in_a_stream():
    """The flow of the last chunk, with all past prototypes in the bank, is that of the streaming memory."""
    story = training_script(np.random.default_rng(3), CHUNKS)
    scenes = [story.scenes[i] for i in story.scene_of_chunks()]
    torch.manual_seed(0)
    latents = torch.randn(1, 16, CHUNKS * CHUNK, 8, 8)
    noisy = torch.randn(1, 16, CHUNK, 8, 8)
    last = (CHUNKS - 1) * CHUNK

    parts = model.build(1)
    config = MemoryConfig(**model.MEMORY).changed(policy="fifo", held_frames=None)
    driver = ChunkDriver(WanModel(parts["transformer"]), config)
    texts = story.prompts()
    with torch.no_grad():
        for chunk, scene in enumerate(story.scene_of_chunks()):
            embeds, mask = encode_prompts(parts["tokenizer"], parts["text_encoder"], [texts[scene]], model.TEXT_LENGTH)
            driver.prompt(embeds, mask)
            start = chunk * CHUNK
            if start == last:
                expected = driver.denoise(noisy, 700.0)
            driver.keep(latents[:, :, start : start + CHUNK])

    trainer = Trainer(model.build(1), seed=0, steps=1)
    places = Places(3, BANK, 9)
    frames = np.full((CHUNKS, 15), -1)
    at = np.zeros((CHUNKS, 15), dtype=np.int64)
    for chunk in range(CHUNKS):
        start, stop = chunk * CHUNK, chunk * CHUNK + CHUNK
        seen = [(f, places.of_sink(f, stop)) for f in range(min(3, start))]
        seen += [(f, places.of_window(f, stop)) for f in range(max(3, stop - 9), start)]
        seen += [(c * CHUNK, places.of_bank(BANK - c)) for c in range(1, chunk - 2)]
        for i, (frame, place) in enumerate(seen):
            frames[chunk, i], at[chunk, i] = frame, place
    own = np.tile(np.arange(places.count - CHUNK, places.count), (CHUNKS, 1))
    batch = Batch(
        numbers=torch.from_numpy(story.frames())[None],
        names=torch.tensor([[scene.name for scene in scenes]]),
        places=torch.tensor([[scene.place for scene in scenes]]),
        prompts=texts,
        prompt_of=torch.from_numpy(story.scene_of_chunks()),
        seen=tuple(torch.from_numpy(x)[None] for x in (frames, at, own)),
    )
    with torch.no_grad():
        clean = latents.unflatten(2, (CHUNKS, CHUNK)).transpose(1, 2)[0]
        rows = torch.cat([clean, noisy.expand(CHUNKS, -1, -1, -1, -1)])
        times = torch.cat([torch.zeros(CHUNKS), torch.full((CHUNKS,), 700.0)])
        trainer.begin(batch)
        found = trainer.transformer(rows, times, rows.new_empty(2 * CHUNKS, 0, model.TEXT_DIM), return_dict=False)[0]
    torch.testing.assert_close(found[-1:], expected, rtol=1e-4, atol=1e-4)


def small_trainer() -> Trainer:
    return Trainer(model.build(1), seed=0, steps=40, stories=1, chunks=4)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.modules.state_dict().items()}


def test_the_story_model_learns_and_a_pause_leaves_no_trace(tmp_path):
    trainer = small_trainer()
    whole = trainer.run(tmp_path / "whole")
    whole.go(stop_step=15, quiet=True)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    whole.go(stop_step=20, quiet=True)
    first, last = (sum(row["flow"] for row in rows) for rows in (whole.rows[:5], whole.rows[-5:]))
    assert last < 0.9 * first

    resumed = small_trainer()
    rest = resumed.run(tmp_path / "parts")
    assert rest.resume() and rest.step == 15
    rest.go(stop_step=20, quiet=True)
    assert rest.rows == whole.rows
    expected, found = weights(trainer), weights(resumed)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def codec_training(folder):
    torch.manual_seed(3)
    codec = StorybookCodec(width=16)
    return codec, codec_run(codec, folder, seed=0, steps=40, batch=4)


def test_the_codec_learns_keeps_its_latents_and_a_pause_leaves_no_trace(tmp_path):
    codec, whole = codec_training(tmp_path / "whole")
    whole.go(stop_step=24, quiet=True)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    whole.go(stop_step=30, quiet=True)
    first, last = (sum(row["psnr"] for row in rows) / 5 for rows in (whole.rows[:5], whole.rows[-5:]))
    assert last > first + 0.5
    resumed, rest = codec_training(tmp_path / "parts")
    assert rest.resume() and rest.step == 24
    rest.go(stop_step=30, quiet=True)
    assert rest.rows == whole.rows
    assert all(torch.equal(a, b) for a, b in zip(codec.parameters(), resumed.parameters(), strict=True))

    before = encode_frames(codec, torch.tensor([[5, 900], [5, 77]]))
    assert before.shape == (2, 2, 16, 8, 8) and torch.equal(before[0, 0], before[1, 0])
    whole.go(quiet=True)  # past the step where the encoder is left alone
    assert torch.equal(encode_frames(codec, torch.tensor([[5, 900], [5, 77]])), before)


def test_training_makes_a_pipeline_that_tells_stories(tmp_path):
    settings = {"seed": 2, "steps": 2, "codec_steps": 4}
    assert train(tmp_path, **settings, minutes=0.0) is None
    with pytest.raises(MemFlowError, match="--resume"):
        train(tmp_path, **settings)
    folder = train(tmp_path, **settings, resume=True)
    assert (tmp_path / "loss.png").stat().st_size > 5000
    pipe = MemFlowPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    video = pipe(["bo, a red ball, jumps on the beach."], seconds_per_prompt=0.75).frames
    assert video.shape == (1, 6, 512, 512, 3) and video.dtype == torch.uint8
    assert torch.equal(video[:, :, ::4, ::4].repeat_interleave(4, 2).repeat_interleave(4, 3), video)


def test_muon_makes_matrices_orthogonal():
    torch.manual_seed(0)
    for size in ((3, 40, 24), (2, 24, 40)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(size)))
        assert values.min() > 0.3 and values.max() < 1.3
    with pytest.raises(ValueError, match="matrices"):
        Muon([torch.nn.Parameter(torch.zeros(3))], lr=0.1)

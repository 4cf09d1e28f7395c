"""The caller's world does not reach a film: whatever torch is set to, the same bits."""

from __future__ import annotations

import threading
from contextlib import ExitStack

import pytest
import torch
from worlds import WORLDS, default_dtype

from memflow import MemFlowPipeline, MemoryConfig
from memflow.decoders import stream_decoder
from memflow.integrations import StreamingAttention
from memflow.models.wan.text import PromptCache
from memflow.modes import own_modes

STORY = ["bo, a red star, jumps on the beach.", "mia, a blue ball, waits in the village."]
SETTINGS = {"seconds_per_prompt": 0.8, "memory": MemoryConfig(top_k=2, bank_frames=2)}


@pytest.fixture(params=WORLDS.values(), ids=WORLDS)
def world(request):
    return request.param


@pytest.fixture(scope="module")
def pipe() -> MemFlowPipeline:
    pipeline = MemFlowPipeline.from_preset("storybook")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def film(pipe):
    """Latents and frames as they are without anything set."""
    output = pipe(STORY, **SETTINGS)
    return output.latents, output.frames


def assert_same(chunks, film) -> None:
    chunks = list(chunks)
    for name, axis, expected in (("latents", 2, film[0]), ("frames", 1, film[1])):
        made = torch.cat([getattr(chunk, name) for chunk in chunks], dim=axis)
        assert made.dtype == expected.dtype and torch.equal(made, expected), name
    assert not any(chunk.latents.is_inference() or chunk.latents.requires_grad for chunk in chunks)


def test_told_inside(pipe, film, world):
    """Made, told, saved and resumed inside: the whole film, and the same through a call of the pipeline."""
    with world():
        chunks = list(pipe.stream(STORY, **SETTINGS))
        output = pipe(STORY, **SETTINGS)
    assert_same(chunks, film)
    assert torch.equal(output.latents, film[0]) and torch.equal(output.frames, film[1])


@pytest.mark.parametrize(
    "inside", [(0, 2), (1,)], ids=["made and second chunk inside", "first chunk and resume inside"]
)
def test_in_and_out(pipe, film, world, inside, tmp_path):
    """Some steps inside, the others outside: making it, its first chunk, its second, and the rest after a resume."""

    def step(number, do):
        with world() if number in inside else ExitStack():
            return do()

    stream = step(0, lambda: pipe.stream(STORY, **SETTINGS))
    chunks = [step(1, lambda: next(stream))]
    step(0, lambda: stream.save(tmp_path / "state"))
    resumed = step(1, lambda: pipe.resume(tmp_path / "state"))
    assert_same([*chunks, step(2, lambda: next(stream)), *stream], film)
    assert_same([*chunks, step(2, lambda: next(resumed)), *resumed], film)


def test_loaded_inside(film, world):
    """Weights that were loaded there tell the same film, there and outside."""
    with world():
        pipeline = MemFlowPipeline.from_preset("storybook")
        pipeline.set_progress_bar_config(disable=True)
        stream = pipeline.stream(STORY, **SETTINGS)
        first = next(stream)
    assert {x.dtype for x in pipeline.transformer.parameters()} == {torch.float32}
    assert_same([first, *stream], film)


def test_text_and_video(pipe, world, tmp_path):
    """What is public of encoding and decoding, and the cache of prompts: made inside and read outside."""

    length = pipe.config.text_length

    def cache():
        return PromptCache(pipe.tokenizer, lambda: pipe.text_encoder, length, dtype=torch.float32, folder=tmp_path)

    latents = torch.randn(1, pipe.transformer.config.in_channels, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = [*pipe.encode(STORY[:1]), stream_decoder(pipe.vae).decode(latents)]
    with world():
        made = [*pipe.encode(STORY[:1]), stream_decoder(pipe.vae).decode(latents)]
        kept = cache()(STORY[:1])
    for ours, theirs in zip(made, expected, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    known = PromptCache(pipe.tokenizer, None, length, dtype=torch.float32, folder=tmp_path)
    for ours, read, theirs in zip(kept, known(STORY[:1]), pipe.encode(STORY[:1]), strict=True):
        assert torch.equal(ours, theirs) and torch.equal(read, theirs)


def test_a_loop_of_ones_own(pipe, world):
    """StreamingAttention: each call inside or outside, in turns."""
    latents, embeds = (
        torch.randn(*size, generator=torch.Generator().manual_seed(0))
        for size in ((1, pipe.transformer.config.in_channels, 3, 8, 8), (1, 4, pipe.transformer.config.text_dim))
    )

    def told(place):
        flows, count = [], 0

        def step(do):
            nonlocal count
            count += 1
            with world() if place(count) else ExitStack():
                return do()

        streaming = step(lambda: StreamingAttention(pipe.transformer, SETTINGS["memory"]))
        step(lambda: streaming.prompt(embeds))
        for _ in range(3):
            flows.append(step(lambda: streaming.denoise(latents, 900.0)))
            step(lambda: streaming.keep(latents))
        step(lambda: streaming.snapshot())
        return torch.stack(flows)

    expected = told(lambda count: False)
    for place in (lambda count: True, lambda count: count % 2, lambda count: count % 2 == 0):
        assert torch.equal(told(place), expected)


def test_threads_that_tell_at_once(pipe, film):
    """The default dtype is one for all threads: a stream that ends must not take it from another that is at work."""
    films, errors = [], []
    other = MemFlowPipeline.from_preset("storybook")
    other.set_progress_bar_config(disable=True)

    def tell(pipeline):
        try:
            films.append(list(pipeline.stream(STORY, **SETTINGS)))
        except BaseException as error:  # shown below
            errors.append(error)

    with default_dtype(torch.float64):
        threads = [threading.Thread(target=tell, args=(pipeline,)) for pipeline in (pipe, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors
    for chunks in films:
        assert_same(chunks, film)


def test_the_last_to_leave_gives_the_default_dtype_back():
    """Two threads: one leaves while the other is inside."""
    entered, leave = threading.Event(), threading.Event()

    def stay():
        with own_modes():
            entered.set()
            leave.wait(60)

    with default_dtype(torch.float64):
        other = threading.Thread(target=stay)
        with own_modes():
            other.start()
            assert entered.wait(60)
        assert torch.get_default_dtype() == torch.float32, "the other is still inside"
        leave.set()
        other.join()
        assert torch.get_default_dtype() == torch.float64


def test_a_stream_moves_from_thread_to_thread(pipe, film):
    """Torch's modes belong to a thread; a stream to none."""
    stream, chunks = pipe.stream(STORY, **SETTINGS), []
    for _ in range(len(stream)):
        thread = threading.Thread(target=lambda: chunks.append(next(stream)))
        thread.start()
        thread.join()
    assert_same(chunks, film)


def test_another_thread_asks_what_is_held(pipe):
    """It waits for the chunk that is being made, or it would be told a mixture of two."""
    stream, told = pipe.stream(STORY, **SETTINGS), []
    next(stream)
    other = threading.Thread(target=lambda: told.append(stream.snapshot()))

    def ask(*_):
        if other.ident is None:
            other.start()
            other.join(0.5)

    hook = pipe.transformer.blocks[0].ffn.register_forward_pre_hook(ask)
    try:
        next(stream)
    finally:
        hook.remove()
    other.join()
    assert told[0].window == stream.snapshot().window

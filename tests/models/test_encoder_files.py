"""Which encoder lies in a folder, and that a state knows it."""

import pytest
import torch

from memflow import MemFlowError, MemFlowPipeline, MemoryConfig
from memflow.models import digests
from memflow.models.digests import encoder_digest, prompt_folder
from memflow.models.wan.text import PromptCache

SETTINGS = {"seconds_per_prompt": 0.8, "memory": MemoryConfig(bank_frames=2)}


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A folder with an encoder of one large file; every file counts as large."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "_SMALL", 0)
    (tmp_path / "model" / "text_encoder").mkdir(parents=True)
    (tmp_path / "model" / "text_encoder" / "weights").write_bytes(bytes(5 * 2**20))
    return tmp_path / "model"


def test_one_byte_and_the_names_count(model):
    weights = model / "text_encoder" / "weights"
    first = encoder_digest(model)
    with open(weights, "r+b") as file:
        file.seek(3 * 2**20 + 7)
        file.write(b"x")
    assert encoder_digest(model) != first
    weights.write_bytes(bytes(5 * 2**20))
    assert encoder_digest(model) == first, "of equal contents, whatever the time"
    weights.rename(weights.with_name("other"))
    assert encoder_digest(model) != first


def test_a_large_file_is_read_once(model, monkeypatch):
    first = encoder_digest(model)
    monkeypatch.setattr(digests, "_read", lambda path: pytest.fail("read again"))
    assert encoder_digest(model) == first


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe", b"0" * 64 + b" " + b"0" * 64, b"one two three"])
def test_a_damaged_entry_is_made_again(model, tmp_path, damage):
    first = encoder_digest(model)
    (kept,) = (tmp_path / "cache" / "memflow" / "digests").iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(damage)
    assert encoder_digest(model) == first
    assert kept.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_no_error(model, tmp_path, monkeypatch):
    first = encoder_digest(model)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert encoder_digest(model) == first


def test_where_entries_are_kept(tmp_path, monkeypatch):
    """A relative XDG_CACHE_HOME would make a folder wherever one happens to be."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    assert prompt_folder("0" * 64) == tmp_path / ".cache" / "memflow" / "prompts" / ("0" * 32)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "there"))
    assert prompt_folder("0" * 64).is_relative_to(tmp_path / "there")


def test_a_state_is_not_resumed_with_another_text_encoder(tmp_path):
    pipe = MemFlowPipeline.from_preset("storybook")
    stream = pipe.stream(["bo, a red star, jumps on the beach."], **SETTINGS)
    next(stream)
    stream.save(tmp_path / "state")
    expected = next(stream).latents
    assert torch.equal(next(pipe.resume(tmp_path / "state")).latents, expected)
    with torch.no_grad():
        next(pipe.text_encoder.parameters())[-1] = 0
    with pytest.raises(MemFlowError, match=r"saved with another model, it differs in: text_encoder$"):
        pipe.resume(tmp_path / "state")


def test_a_state_is_not_resumed_with_another_folders_encoder(tmp_path):
    pipe = MemFlowPipeline.from_preset("storybook")
    encoder, length = pipe.text_encoder, pipe.config.text_length

    def loads(digest):
        pipe.prompts = PromptCache(pipe.tokenizer, lambda: encoder, length, dtype=torch.float32, encoder=digest)

    loads("one")
    stream = pipe.stream(["bo, a red star, jumps on the beach."], **SETTINGS)
    next(stream)
    stream.save(tmp_path / "state")
    loads("other")
    with pytest.raises(MemFlowError, match=r"saved with another model, it differs in: text_encoder_files$"):
        pipe.resume(tmp_path / "state")
    pipe.prompts = None  # in memory: nothing is known of its files
    assert torch.equal(next(pipe.resume(tmp_path / "state")).latents, next(stream).latents)

"""Embeddings that are kept on disk: used when they are whole and belong to the prompt, otherwise made anew."""

from __future__ import annotations

import os
import random
import threading
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import ByT5Tokenizer

from memflow.models.wan.text import PromptCache

DIM, LENGTH, PROMPT = 8, 16, "a fox runs"


class Encoder(nn.Module):
    """Embeddings of bytes, and how often they were asked for."""

    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.calls = 0
        self.table = torch.randn(512, DIM, generator=torch.Generator().manual_seed(0))

    def forward(self, ids, attention_mask):
        self.calls += 1
        return SimpleNamespace(last_hidden_state=self.table[ids])


@pytest.fixture
def encoder():
    return Encoder()


@pytest.fixture
def cache(encoder, tmp_path):
    """A new cache on the same folder with every call."""

    def make(load=lambda: encoder):
        return PromptCache(ByT5Tokenizer(), load, LENGTH, dtype=torch.float32, folder=tmp_path / "kept", text_dim=DIM)

    return make


def entry_of(cache):
    return cache()._path(PROMPT)


def rewrite(cache, entry, change, sealed=True):
    """Other numbers in an entry; sealed: with the digest that fits them."""
    row = change(load_file(entry)["embeds"])
    digest = cache()._digest(PROMPT, row) if sealed else "0" * 64
    save_file({"embeds": row.contiguous()}, entry, metadata={"digest": digest})


def with_nan(row):
    return row.index_fill(1, torch.tensor([3]), float("nan"))


def link_to_a_copy(cache, entry):
    copy = entry.with_name("copy")
    entry.rename(copy)
    entry.symlink_to(copy)


def pipe_of_its_name(cache, entry):
    entry.unlink()
    os.mkfifo(entry)


DAMAGES = {
    "NaN": lambda cache, entry: rewrite(cache, entry, with_nan),
    "another width": lambda cache, entry: rewrite(cache, entry, lambda row: row[:, :5]),
    "another dtype": lambda cache, entry: rewrite(cache, entry, lambda row: row.half()),
    "too long": lambda cache, entry: rewrite(cache, entry, lambda row: row.repeat(9, 1)),
    "no rows": lambda cache, entry: rewrite(cache, entry, lambda row: row[:0]),
    "another digest": lambda cache, entry: rewrite(cache, entry, lambda row: row, sealed=False),
    "no digest": lambda cache, entry: save_file(load_file(entry), entry),
    "cut": lambda cache, entry: entry.write_bytes(entry.read_bytes()[:-3]),
    "empty": lambda cache, entry: entry.write_bytes(b""),
    "a link": link_to_a_copy,
    "a dangling link": lambda cache, entry: (entry.unlink(), entry.symlink_to("nowhere")),
    "a named pipe": pipe_of_its_name,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_entry_is_made_anew(cache, encoder, damage):
    expected = cache()([PROMPT])[0]
    entry = entry_of(cache)
    good = entry.read_bytes()
    damage(cache, entry)
    assert torch.equal(cache()([PROMPT])[0], expected)
    assert encoder.calls == 2
    assert entry.read_bytes() == good and not entry.is_symlink()
    assert torch.equal(cache(None)([PROMPT])[0], expected), "whole again: no encoder is needed"


def test_a_link_is_replaced_and_what_it_points_to_left_alone(cache, tmp_path):
    cache()([PROMPT])
    entry, other = entry_of(cache), tmp_path / "precious"
    other.write_text("not ours")
    entry.unlink()
    entry.symlink_to(other)
    cache()([PROMPT])
    assert other.read_text() == "not ours" and not entry.is_symlink()


def test_any_flipped_bit_is_seen(cache):
    """Of the numbers, of their names and sizes, of the text: the same embeddings all the same."""
    expected = cache()([PROMPT])[0]
    entry, draw = entry_of(cache), random.Random(0)
    good = entry.read_bytes()
    for bit in draw.sample(range(8 * len(good)), 200):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        entry.write_bytes(bad)
        assert torch.equal(cache()([PROMPT])[0], expected), bit


def test_nothing_is_kept_of_an_encoder_that_makes_nan(cache, encoder):
    encoder.table.fill_(float("nan"))
    cache()([PROMPT])
    assert not entry_of(cache).exists()


def test_many_at_once(cache):
    """Writers of one entry do not meet in a file, and leave none behind."""
    expected, made = cache()([PROMPT])[0], []
    entry = entry_of(cache)

    def use():
        for _ in range(20):
            entry.unlink(missing_ok=True)
            made.append(torch.equal(cache()([PROMPT])[0], expected))

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [True] * 80
    assert set(os.listdir(entry.parent)) <= {entry.name}

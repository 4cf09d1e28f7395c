"""A folder for --model as a crash, a stranger or a careless editor leaves it: one sentence, and nobody on the net is
asked."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import memflow
from memflow.cli import main

BASE = Path(memflow.__file__).parent / "assets" / "storybook"
STORY = ["generate", "-p", "bo, a red star, jumps.", "--seconds-per-prompt", "0.4", "--no-prompt-cache"]


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A copy of the storybook; whoever looks a name up on the net fails."""

    def asked(host, *rest, **options):
        pytest.fail(f"{host} was asked for")

    monkeypatch.setattr(socket, "getaddrinfo", asked)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(BASE, "model")
    return Path("model")


def refused(capsys) -> str:
    capsys.readouterr()
    assert main([*STORY, "--model", "model", "-o", "a.mp4"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("memflow: --model model: "), said
    assert not os.path.exists("a.mp4")
    return said


JSON = ["model_index.json", "scheduler/scheduler_config.json", "transformer/config.json", "vae/config.json"]
JSON += ["text_encoder/config.json", "tokenizer/tokenizer_config.json"]
CONTENTS = {"a name": b'"someone/model"', "a number": b"7", "a list": b"[]", "deep": b"[" * 100_000, "cut": b'{"a"'}
CONTENTS["without an end"] = b"{" + b" " * (16 * 2**20) + b"}"


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
@pytest.mark.parametrize("file", JSON)
def test_a_configuration_that_is_no_object(model, capsys, file, content):
    (model / file).write_bytes(content)
    assert f"cannot be loaded: model/{file}: " in refused(capsys)


FIELDS = {
    "model_index.json": [
        ("fps", None), ("fps", -1), ("fps", 1e300), ("text_length", 0), ("text_length", "x"), ("height", 10**30),
        ("height", 0), ("memory", "x"), ("memory", {"bank_frames": -1}), ("scheduler", []), ("transformer", ["x", "y"]),
    ],
    "transformer/config.json": [("num_layers", -1), ("num_attention_heads", 0), ("in_channels", "x")],
    "text_encoder/config.json": [("num_layers", 9), ("d_model", 128), ("num_heads", 0)],
}  # fmt: skip
FIELDS = [(file, name, value) for file, fields in FIELDS.items() for name, value in fields]


@pytest.mark.parametrize(("file", "name", "value"), FIELDS, ids=lambda part: str(part))
def test_a_setting_that_cannot_be(model, capsys, file, name, value):
    (model / file).write_text(json.dumps(json.loads((model / file).read_text()) | {name: value}))
    refused(capsys)


FILES = ["transformer/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"]
FILES += ["text_encoder/model.safetensors", "tokenizer/tokenizer.json", "pytorch_lora_weights.safetensors"]


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "a folder"])
@pytest.mark.parametrize("file", FILES)
def test_a_file_that_is_damaged(model, capsys, file, damage):
    path = model / file
    if not path.exists():
        save_file({"transformer.blocks.0.attn1.to_q.lora_A.weight": torch.zeros(2, 2)}, path)
    content = path.read_bytes()
    path.unlink()
    if damage == "a folder":
        path.mkdir()
        if file == FILES[-1]:  # is none then, and the model has none
            assert main([*STORY, "--model", "model", "-o", "a.mp4"]) == 0
            return
    else:
        path.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "text": b"nothing"}[damage])
    refused(capsys)


@pytest.mark.parametrize("file", FILES[:3])
def test_a_weight_that_is_missing_is_not_drawn_at_random(model, capsys, file):
    weights = load_file(model / file)
    lost = sorted(weights)[-1]
    del weights[lost]
    save_file(weights, model / file, metadata={"format": "pt"})
    assert " of its weights are not there" in (said := refused(capsys)) and lost in said


def test_weights_of_another_size_are_named(model, capsys):
    file = model / "text_encoder/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"d_model": 128}))
    assert "or have another size: encoder.block.0.layer.0.SelfAttention.k.weight" in refused(capsys)


def test_an_index_without_a_class_says_what_it_lacks(model, capsys):
    (model / "model_index.json").write_text("{}")
    assert refused(capsys).endswith("cannot be loaded: there is no '_class_name'")

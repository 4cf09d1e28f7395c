"""What `memflow convert` refuses by name: numbers that are none, another model than the preset's, damaged files."""

import shutil

import pytest
import torch
from safetensors.torch import save_file
from test_convert import convert
from written import HEADS, lora, random, transformer, vae

import memflow.convert as module
from memflow.models.wan.published import MODELS


@pytest.fixture
def ours(tmp_path):
    return ["-o", tmp_path / "out", "--heads", HEADS]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("kind", "name"), [("transformer", "blocks.1.ffn.2.bias"), ("vae", "decoder.head.2.weight")])
def test_weights_that_are_no_numbers(kind, name, value, wan, ours, tmp_path, capsys):
    tensors = {"transformer": transformer, "vae": vae}[kind]()
    tensors[name].view(-1)[3] = value
    torch.save(tensors, tmp_path / "a.pth")
    code, _, error = convert(capsys, wan, tmp_path / "a.pth", *ours)
    assert code == 2 and f"a.pth: {name} holds NaN or infinity" in error, error
    assert not (tmp_path / "out" / "model_index.json").exists()


def test_numbers_that_the_format_cannot_hold(wan, ours, tmp_path, capsys):
    tensors = transformer()
    tensors["blocks.0.ffn.0.weight"][0, 0] = 1e5
    torch.save(tensors, tmp_path / "a.pt")
    code, _, error = convert(capsys, wan, tmp_path / "a.pt", *ours, "--dtype", "float16")
    assert code == 2 and "a.pt: blocks.0.ffn.0.weight has numbers that torch.float16 cannot hold" in error, error
    assert convert(capsys, wan, tmp_path / "a.pt", *ours[2:], "-o", tmp_path / "b", "--dtype", "bfloat16")[0] == 0


@pytest.mark.parametrize("options", [[], ["--keep-lora"]])
def test_a_lora_that_is_no_numbers(options, wan, ours, tmp_path, capsys):
    tensors = lora()
    tensors["blocks.0.ffn.2.lora_B.weight"][0, 0] = torch.nan
    save_file(tensors, tmp_path / "lora.safetensors")
    code, _, error = convert(capsys, wan, tmp_path / "lora.safetensors", *ours, *options)
    assert code == 2 and "lora.safetensors: blocks.0.ffn.2.lora_B holds NaN or infinity" in error, error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [[], ["--partial"]])
def test_another_model_than_the_presets(options, wan, ours, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "MODELS", MODELS)  # as they are
    code, _, error = convert(capsys, wan, *ours, "--preset", "memflow-1.3b", *options)
    found = "num_attention_heads 4 (needs 12), attention_head_dim 12 (needs 128), ffn_dim 40 (needs 8960)"
    assert code == 2 and "diffusion_pytorch_model.safetensors is not the model of --preset memflow-1.3b: " in error
    assert f"{found}, num_layers 2 (needs 30)" in error, error
    assert not (tmp_path / "out").exists()


def test_wan_2_1_is_not_the_model_of_a_wan_2_2_preset(wan, ours, tmp_path, capsys):
    code, _, error = convert(capsys, wan, *ours, "--preset", "longlive2-5b")
    assert code == 2 and "--preset longlive2-5b: in_channels 16 (needs 48), out_channels 16 (needs 48)" in error, error
    wide = {"patch_embedding.weight": [48, 48, 1, 2, 2], "head.head.weight": [192, 48], "head.head.bias": [192]}
    noise = torch.Generator().manual_seed(0)
    torch.save(transformer() | {name: random(shape, noise) for name, shape in wide.items()}, tmp_path / "5b.pt")
    code, _, error = convert(capsys, tmp_path / "5b.pt", *ours, "--partial", "--preset", "memflow-1.3b")
    assert code == 2 and "--preset memflow-1.3b: in_channels 48 (needs 16), out_channels 48 (needs 16)" in error, error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["Wan2.1_VAE.pth", "vae.safetensors"])
@pytest.mark.parametrize("keep", [0, 100, 0.5])
def test_a_damaged_file_of_a_folder_is_named(name, keep, wan, ours, tmp_path, capsys):
    """Skipped without a word it would be said to be missing."""
    folder = shutil.copytree(wan, tmp_path / "folder")
    (folder / "Wan2.1_VAE.pth").unlink()
    (torch.save if name.endswith("pth") else lambda tensors, path: save_file(tensors, path))(vae(), folder / name)
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: keep if isinstance(keep, int) else int(keep * len(whole))])
    code, _, error = convert(capsys, folder, *ours)
    assert code == 2 and "no vae among them;" in error and f"{name}: not a readable checkpoint" in error, error
    code, _, error = convert(capsys, folder, *ours, "--partial")
    assert code == 0 and f"left out: {folder / name}: not a readable checkpoint" in error, error

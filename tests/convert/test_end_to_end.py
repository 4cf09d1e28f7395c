"""From original files to a video with two commands, on the path of the real models; and what the second run saves."""

import os
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import transformers
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from test_convert import convert
from written import HEADS, lora, random, text_encoder, tokenizer, transformer, vae_2_2_names

from memflow import MemFlowPipeline, MemoryConfig
from memflow.cli import main
from memflow.cli.loading import load_pipeline
from memflow.models.wan import WAN_2_2_VAE
from memflow.models.wan.published import PRESETS

STORY = ["-p", "a fox runs", "-p", "the owl sleeps"]
SMALL = ["--device", "cpu", "--height", "32", "--width", "48", "--seconds-per-prompt", "1"]  # one chunk each
FRAMES = 9 + 12  # of three latent frames each; the very first is one frame of video


@pytest.fixture(scope="module")
def model(wan, tmp_path_factory):
    """A converted folder, with a LoRA and a preset as a published model has them."""
    folder = tmp_path_factory.mktemp("model")
    adapter = {f"base_model.model.{name}": tensor for name, tensor in lora(3).items()}
    torch.save({"generator_lora": adapter, "critic_lora": {}}, folder / "lora.pt")
    sources, out = [str(wan), str(folder / "lora.pt")], folder / "memflow"
    assert main(["convert", *sources, "-o", str(out), "--heads", str(HEADS), "--preset", "memflow-1.3b"]) == 0
    return out


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "memflow" / "prompts"


def generate(*arguments):
    return main(["generate", *map(str, arguments)])


def decode(path):
    with av.open(str(path)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


def no_encoder(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the text encoder was loaded")

    monkeypatch.setattr(transformers.UMT5EncoderModel, "from_pretrained", refuse)


def test_two_commands_make_the_video_that_diffusers_models_make(model, cache, tmp_path, capsys):
    assert generate(*STORY, "-o", tmp_path / "a.mp4", "--model", model, *SMALL) == 0
    assert f"{FRAMES} frames" in capsys.readouterr().out
    assert decode(tmp_path / "a.mp4").shape == (FRAMES, 32, 48, 3)
    # The same from parts that nothing of ours has loaded.
    pipe = MemFlowPipeline(
        tokenizer=transformers.AutoTokenizer.from_pretrained(model / "tokenizer"),
        text_encoder=transformers.UMT5EncoderModel.from_pretrained(model / "text_encoder").eval(),
        transformer=WanTransformer3DModel.from_pretrained(model / "transformer").eval(),
        vae=AutoencoderKLWan.from_pretrained(model / "vae").eval(),
        scheduler=PRESETS["memflow-1.3b"].scheduler(),
    )
    prompts = [text for text in STORY if text != "-p"]
    memory = MemoryConfig.published("interactive", record_interval=3)
    from memflow.output.video import VideoWriter

    with VideoWriter(tmp_path / "b.mp4", pipe.fps) as video:
        for chunk in pipe.stream(prompts, seconds_per_prompt=1, height=32, width=48, memory=memory):
            video.write(chunk.frames[0].numpy())
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_known_prompts_need_no_text_encoder(model, cache, tmp_path, monkeypatch, capsys):
    first, second = tmp_path / "first.mp4", tmp_path / "second.mp4"
    assert generate(*STORY, "-o", first, "--model", model, *SMALL) == 0
    entries = sorted(cache.rglob("*.safetensors"))
    assert len(entries) == 2 and len({entry.parent for entry in entries}) == 1
    assert not list(cache.rglob("*.partial"))
    with monkeypatch.context() as patch:
        no_encoder(patch)
        assert generate(*STORY, "-o", second, "--model", model, *SMALL) == 0
        assert first.read_bytes() == second.read_bytes()
        assert generate("-p", "the owl runs", "-o", second, "--model", model, *SMALL) == 2
        assert "the text encoder was loaded" in capsys.readouterr().err
    # Another number format has entries of its own; in float16 parts of the encoder stay in float32.
    pipe = load_pipeline(str(model), torch.device("cpu"), torch.float16)
    embeds, mask = pipe.encode(["the owl sleeps"])
    assert embeds.dtype == torch.float16 and mask.sum() == 4
    assert len(list(cache.rglob("*.safetensors"))) == 3
    no_encoder(monkeypatch)
    pipe = load_pipeline(str(model), torch.device("cpu"), torch.float16)
    assert torch.equal(pipe.encode(["the  owl sleeps "])[0], embeds)


def test_the_cache_can_be_left_alone(model, cache, tmp_path):
    assert generate(*STORY, "-o", tmp_path / "a.mp4", "--model", model, *SMALL, "--no-prompt-cache") == 0
    assert not cache.exists()
    assert generate(*STORY, "-o", tmp_path / "b.mp4", "--model", model, *SMALL) == 0
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def damage_bytes(entry: Path):
    entry.write_bytes(entry.read_bytes()[: entry.stat().st_size // 2])


def damage_text(entry: Path):
    save_file(load_file(entry), entry, metadata={"text": "another prompt"})


def damage_shape(entry: Path):
    save_file({"embeds": torch.zeros(24)}, entry, metadata={"text": "a fox runs"})


def empty(entry: Path):
    entry.write_bytes(b"")


def test_damaged_entries_are_made_again(model, cache):
    def embeds():
        pipe = load_pipeline(str(model), torch.device("cpu"), torch.float32)
        return pipe.encode(["a fox runs"])[0]

    first = embeds()
    (entry,) = cache.rglob("*.safetensors")
    good = entry.read_bytes()
    for damage in (damage_bytes, damage_text, damage_shape, empty):
        damage(entry)
        assert entry.read_bytes() != good
        assert torch.equal(embeds(), first), damage.__name__
        assert entry.read_bytes() == good


def test_an_unusable_cache_folder_is_no_error(model, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert generate("-p", "a fox runs", "-o", tmp_path / "a.mp4", "--model", model, *SMALL) == 0


def test_a_broken_text_encoder_is_named(model, cache, tmp_path, capsys):
    copy = tmp_path / "copy"
    copy.mkdir()
    for entry in model.iterdir():
        os.symlink(entry, copy / entry.name)
    (copy / "text_encoder").unlink()
    (copy / "text_encoder").mkdir()
    assert generate("-p", "a fox runs", "-o", tmp_path / "a.mp4", "--model", copy, *SMALL) == 2
    assert f"--model {copy}: its text encoder cannot be loaded" in capsys.readouterr().err


def test_a_preset_overrules_what_the_folder_recorded(model, cache, tmp_path, capsys):
    preset = ["--preset", "self-forcing-1.3b"]
    long = [*SMALL[:-1], "2"]  # six chunks: more than sink and window hold
    assert generate(*STORY, "-o", tmp_path / "a.mp4", "--model", model, *long) == 0
    assert generate(*STORY, "-o", tmp_path / "b.mp4", "--model", model, *long, *preset) == 0
    assert not np.array_equal(decode(tmp_path / "a.mp4"), decode(tmp_path / "b.mp4"))
    state = tmp_path / "state"
    pause = ["--chunks", "2", "--save-state", state]
    assert generate(*STORY, "-o", tmp_path / "c.mp4", "--model", model, *long, *preset, *pause) == 0
    assert generate("--resume", state, "-o", tmp_path / "c.mp4", *preset) == 2
    assert "leave out --preset" in capsys.readouterr().err
    assert generate("--resume", state, "-o", tmp_path / "c.mp4") == 0
    assert (tmp_path / "c.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_presets_that_cannot_be(model, tmp_path, capsys):
    preset = ["--preset", "self-forcing-1.3b"]
    assert generate(*STORY, "-o", tmp_path / "d.mp4", *preset) == 2
    assert "--preset is for --model FOLDER" in capsys.readouterr().err
    assert generate(*STORY, "-o", tmp_path / "d.mp4", "--model", model, "--preset", "sora") == 2
    assert "there is no preset 'sora'" in capsys.readouterr().err
    assert generate(*STORY, "-o", tmp_path / "d.mp4", "--model", "memflow-1.3b") == 2
    assert "its weights are made into a folder with `memflow convert`" in capsys.readouterr().err


def test_activation_on_and_off(model, cache, tmp_path):
    """Off as released, on with --top-k: of three chunks the second and third choose among the frames of the first."""
    long = [*SMALL[:-1], "2"]
    for name, options in {"off": [], "on": ["--top-k", "1"], "all": ["--top-k", "6"]}.items():
        assert generate(*STORY[:2], "-o", tmp_path / f"{name}.mp4", "--model", model, *long, *options) == 0
    off, on, everything = (decode(tmp_path / f"{name}.mp4") for name in ("off", "on", "all"))
    assert not np.array_equal(off, on) and np.array_equal(off, everything)


def test_convert_tells_what_it_did(wan, tmp_path, capsys):
    code, told, _ = convert(capsys, wan, "-o", tmp_path / "out", "--heads", HEADS)
    assert code == 0
    assert "transformer   69 tensors" in told and "no preset recorded" in told and str(tmp_path / "out") in told


def test_wan_2_2_becomes_a_pipeline_of_its_own_chunks(tmp_path, cache, capsys):
    """48 latent channels, a VAE of 16 pixels a side, chunks of 8 latent frames."""
    source, noise = tmp_path / "source", torch.Generator().manual_seed(5)
    source.mkdir()
    with torch.device("meta"):
        shapes = AutoencoderKLWan(**{**WAN_2_2_VAE, "base_dim": 4, "decoder_base_dim": 4}).state_dict()
    torch.save(
        {old: random(shapes[new].shape, noise) for old, new in vae_2_2_names().items()}, source / "Wan2.2_VAE.pth"
    )
    wide = {"patch_embedding.weight": [48, 48, 1, 2, 2], "head.head.weight": [192, 48], "head.head.bias": [192]}
    save_file(
        transformer() | {name: random(shape, noise) for name, shape in wide.items()}, source / "model.safetensors"
    )
    torch.save(text_encoder(), source / "models_t5.pth")
    tokenizer(source / "umt5-xxl")
    options = ("-o", tmp_path / "model", "--heads", HEADS, "--preset", "longlive2-5b")
    assert main(["convert", str(source), *map(str, options)]) == 0
    found = AutoencoderKLWan.from_pretrained(tmp_path / "model" / "vae")
    assert (found.config.z_dim, found.config.patch_size, found.config.scale_factor_spatial) == (48, 2, 16)
    size = ("--device", "cpu", "--height", 32, "--width", 64, "--seconds-per-prompt", 1)
    assert generate("-p", "a fox runs", "-o", tmp_path / "a.mp4", "--model", tmp_path / "model", *size) == 0
    assert decode(tmp_path / "a.mp4").shape == (29, 32, 64, 3)

"""`memflow convert`: every original layout arrives parameter by parameter in what the libraries load by themselves."""

import json

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, UMT5EncoderModel
from written import HEADS, random, text_encoder, tokenizer, transformer, umt5_name, vae, vae_table

from memflow import MemFlowPipeline
from memflow.cli import main
from memflow.models.wan.checkpoints import load_transformer


def convert(capsys, *arguments):
    """Exit code, stdout and stderr, spaces collapsed."""
    code = main(["convert", *map(str, arguments)])
    output = capsys.readouterr()
    return code, output.out, " ".join(output.err.split())


@pytest.fixture
def ours(tmp_path):
    return ["-o", tmp_path / "out", "--heads", HEADS]


def expected_transformer(tmp_path, seed=0):
    save_file(transformer(seed), tmp_path / "expected.safetensors")
    return load_transformer(tmp_path / "expected.safetensors", num_attention_heads=HEADS).state_dict()


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_the_wan_folder_becomes_a_pipeline(wan, ours, tmp_path, capsys):
    code, told, _ = convert(capsys, wan, *ours, "--preset", "memflow-1.3b")
    assert code == 0 and "194 tensors" in told
    out = tmp_path / "out"
    model = WanTransformer3DModel.from_pretrained(out / "transformer")
    assert_equal(model.state_dict(), expected_transformer(tmp_path))
    table = vae_table()
    found = AutoencoderKLWan.from_pretrained(out / "vae").state_dict()
    assert_equal(found, {table[old][0]: tensor for old, tensor in vae().items()})
    found = UMT5EncoderModel.from_pretrained(out / "text_encoder").state_dict()
    tied = {"encoder.embed_tokens.weight": text_encoder()["token_embedding.weight"]}
    assert_equal(found, {umt5_name(old): tensor for old, tensor in text_encoder().items()} | tied)
    text = "the fox runs a owl"
    ids = AutoTokenizer.from_pretrained(wan / "google" / "umt5-xxl")(text).input_ids
    assert AutoTokenizer.from_pretrained(out / "tokenizer")(text).input_ids == ids == [7, 4, 5, 3, 8, 1]
    pipe = MemFlowPipeline.from_pretrained(out)
    assert_equal(pipe.transformer.state_dict(), model.state_dict())
    assert (pipe.memory_config.record_interval, pipe.memory_config.published_mode) == (3, "interactive")
    assert [round(t, 1) for t in pipe.schedule.timesteps] == [1000.0, 937.5, 833.3, 625.0]


def test_a_text_encoder_computes_what_the_original_computes(wan, ours, tmp_path, capsys):
    """The formulas of wan/modules/t5.py on the original tensors: a mix-up of equally shaped weights shows."""
    assert convert(capsys, wan, *ours)[0] == 0
    encoder = UMT5EncoderModel.from_pretrained(tmp_path / "out" / "text_encoder").eval()
    ids = torch.tensor([[4, 7, 3, 5, 8, 4, 6, 1]])
    with torch.no_grad():
        found = encoder(ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
    torch.testing.assert_close(found, original_umt5(text_encoder(), ids[0]), atol=2e-6, rtol=1e-5)


def original_umt5(w, ids):
    def norm(x, name):
        return w[f"{name}.weight"] * x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()

    x = w["token_embedding.weight"][ids]
    position = torch.arange(len(ids))
    distance = position[None] - position[:, None]
    bucket = (distance > 0) * 16 + distance.abs()  # 32 buckets; exact below a distance of 8
    for i in range(2):
        b = f"blocks.{i}"
        h = norm(x, f"{b}.norm1")
        q, k, v = (torch.unflatten(h @ w[f"{b}.attn.{n}.weight"].T, 1, (3, -1)).transpose(0, 1) for n in "qkv")
        bias = w[f"{b}.pos_embedding.embedding.weight"][bucket].permute(2, 0, 1)
        mixed = (q @ k.transpose(1, 2) + bias).softmax(-1) @ v
        x = x + mixed.transpose(0, 1).flatten(1) @ w[f"{b}.attn.o.weight"].T
        h = norm(x, f"{b}.norm2")
        gate = torch.nn.functional.gelu(h @ w[f"{b}.ffn.gate.0.weight"].T, approximate="tanh")
        x = x + (gate * (h @ w[f"{b}.ffn.fc1.weight"].T)) @ w[f"{b}.ffn.fc2.weight"].T
    return norm(x, "norm")


GENERATORS = {
    "self_forcing_dmd.pt": lambda t: {"generator_ema": {f"model.{n}": x for n, x in t.items()}},
    "longlive_base.pt": lambda t: {"generator": {f"model.{n}": x for n, x in t.items()}},
    "base.pt": lambda t: {"generator": {f"model._fsdp_wrapped_module.{n}": x for n, x in t.items()}, "critic": {}},
    "plain.pth": lambda t: t,
    "averaged.pt": lambda t: {"model": t},
}


@pytest.mark.parametrize("name", GENERATORS)
def test_a_generator_takes_the_place_of_the_base_model(name, wan, ours, tmp_path, capsys):
    torch.save(GENERATORS[name](transformer(seed=9)), tmp_path / name)
    code, told, _ = convert(capsys, wan, tmp_path / name, *ours)
    assert code == 0 and f"from {name}" in told
    found = WanTransformer3DModel.from_pretrained(tmp_path / "out" / "transformer").state_dict()
    assert_equal(found, expected_transformer(tmp_path, seed=9))


BOTH = {
    ("--preset", "memflow-1.3b"): ("generator", 9),
    ("--preset", "longlive-1.3b"): ("generator", 9),
    ("--preset", "self-forcing-1.3b"): ("generator_ema", 10),
    (): ("generator_ema", 10),
    ("--preset", "memflow-1.3b", "--weights", "generator_ema"): ("generator_ema", 10),
    ("--weights", "generator"): ("generator", 9),
}


@pytest.mark.parametrize("options", BOTH, ids=" ".join)
def test_of_trained_and_averaged_weights_those_of_the_preset_are_taken(options, ours, tmp_path, capsys):
    """What MemFlow and LongLive run (use_ema: false in their configurations) is not what Self-Forcing runs."""
    torch.save({"generator": transformer(seed=9), "generator_ema": transformer(seed=10)}, tmp_path / "both.pt")
    taken, seed = BOTH[options]
    left = {"generator": "generator_ema", "generator_ema": "generator"}[taken]
    code, told, _ = convert(capsys, tmp_path / "both.pt", *ours, "--partial", *options)
    assert code == 0 and f"from both.pt ({taken}, not its {left})" in told
    found = WanTransformer3DModel.from_pretrained(tmp_path / "out" / "transformer").state_dict()
    assert_equal(found, expected_transformer(tmp_path, seed))


@pytest.mark.parametrize("content", ["generator", None])
def test_weights_that_no_file_holds_are_refused(content, ours, tmp_path, capsys):
    torch.save({content: transformer()} if content else transformer(), tmp_path / "a.pt")
    code, _, error = convert(capsys, tmp_path / "a.pt", *ours, "--partial", "--weights", "generator_ema")
    assert code == 2 and "--weights generator_ema: there are none of that name in a.pt" in error
    assert not (tmp_path / "out").exists()
    if content:
        code, told, _ = convert(capsys, tmp_path / "a.pt", *ours, "--partial", "--preset", "self-forcing-1.3b")
        assert code == 0 and "from a.pt\n" in told, "a preset takes what there is"


def test_sharded_sources_and_shards_written(wan, ours, tmp_path, capsys):
    whole = list(transformer(seed=5).items())
    names = [tmp_path / f"diffusion_pytorch_model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    for i, name in enumerate(names):
        save_file(dict(whole[i * 25 : (i + 1) * 25]), name)
    assert convert(capsys, wan, names[1], *ours, "--shard-gigabytes", "0.0002")[0] == 0
    written = sorted(path.name for path in (tmp_path / "out" / "vae").glob("*.safetensors"))
    assert len(written) > 4
    assert written == [
        f"diffusion_pytorch_model-{i:05}-of-{len(written):05}.safetensors" for i in range(1, len(written) + 1)
    ]
    found = WanTransformer3DModel.from_pretrained(tmp_path / "out" / "transformer").state_dict()
    assert_equal(found, expected_transformer(tmp_path, seed=5))
    table = vae_table()
    found = AutoencoderKLWan.from_pretrained(tmp_path / "out" / "vae").state_dict()
    assert_equal(found, {table[old][0]: tensor for old, tensor in vae().items()})
    names[2].unlink()
    code, _, error = convert(capsys, names[0], *ours)
    assert code == 2 and "is one of 3 files, and diffusion_pytorch_model-00003-of-00003.safetensors is not" in error


def test_number_formats_are_those_of_from_pretrained(wan, ours, tmp_path, capsys):
    assert convert(capsys, wan, *ours, "--dtype", "bfloat16")[0] == 0
    found = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    save_file(transformer(), tmp_path / "t.safetensors")
    wanted = load_transformer(tmp_path / "t.safetensors", num_attention_heads=HEADS, dtype=torch.bfloat16).state_dict()
    assert {t.dtype for t in wanted.values()} == {torch.bfloat16, torch.float32}
    assert {name: t.dtype for name, t in found.items()} == {name: t.dtype for name, t in wanted.items()}
    assert_equal(found, wanted)
    config = json.loads((tmp_path / "out" / "text_encoder" / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and config["architectures"] == ["UMT5EncoderModel"]


BROKEN = {
    "1 missing tensors: blocks.1.ffn.net.2.bias": lambda t: t.pop("blocks.1.ffn.2.bias"),
    "is an image-to-video model (img_emb.proj.0.bias)": lambda t: t.update({"img_emb.proj.0.bias": torch.zeros(2)}),
    "1 misshapen tensors: blocks.0.ffn.0.bias [3] (needs [40])": lambda t: t.update(
        {"blocks.0.ffn.0.bias": torch.zeros(3)}
    ),
    "weights in number formats that are not known here: proj_out.bias (torch.float8_e4m3fn)": lambda t: t.update(
        {"head.head.bias": torch.zeros(64).to(torch.float8_e4m3fn)}
    ),
}


@pytest.mark.parametrize("message", BROKEN)
def test_wrong_tensors_are_refused_by_name_before_anything_is_written(message, wan, ours, tmp_path, capsys):
    tensors = transformer()
    BROKEN[message](tensors)
    torch.save(tensors, tmp_path / "a.pt")
    code, _, error = convert(capsys, wan, tmp_path / "a.pt", *ours)
    assert code == 2 and f"a.pt: {message}" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [[], ["--partial"]])
def test_parts_of_different_models_are_no_pipeline(options, wan, ours, tmp_path, capsys):
    """Else the first chunk would be denoised before anybody notices."""
    noise = torch.Generator().manual_seed(0)
    shapes = {"patch_embedding.weight": [48, 48, 1, 2, 2], "head.head.weight": [192, 48], "head.head.bias": [192]}
    others = {
        "latents.pt": (shapes, "makes 48 latent channels, and Wan2.1_VAE.pth decodes 16"),
        "text.pt": ({"text_embedding.0.weight": [48, 20]}, "takes embeddings of 20 numbers, and models_t5_umt5-xxl"),
    }
    for name, (other, message) in others.items():
        tensors = transformer() | {tensor: random(shape, noise) for tensor, shape in other.items()}
        torch.save(tensors, tmp_path / name)
        code, _, error = convert(capsys, wan, tmp_path / name, *ours, *options)
        assert code == 2 and f"{name} {message}" in error and "they belong to different models" in error, error
        assert not (tmp_path / "out").exists()


def test_partial_converts_what_is_there_and_lists_the_rest(ours, tmp_path, capsys):
    tensors = transformer() | {"stranger": torch.zeros(1), "blocks.0.ffn.0.bias": torch.zeros(3)}
    del tensors["blocks.1.norm3.weight"]
    torch.save(tensors, tmp_path / "a.pt")
    code, _, error = convert(capsys, tmp_path / "a.pt", *ours)
    assert code == 2 and "a pipeline needs more than the given files: no text encoder, no vae, no tokenizer" in error
    code, told, error = convert(capsys, tmp_path / "a.pt", *ours, "--partial")
    assert code == 0 and "no pipeline yet" in told
    for note in ("missing: blocks.1.norm2.weight", "unexpected: stranger", "misshapen: blocks.0.ffn.0.bias [3]"):
        assert f"left out of the transformer: {note}" in error
    found = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert len(found) == len(transformer()) - 2
    assert not (tmp_path / "out" / "model_index.json").exists()


def test_wrong_sources_and_outputs(wan, ours, tmp_path, capsys):
    (tmp_path / "text.pt").write_text("no tensors")
    (tmp_path / "empty").mkdir()
    (tmp_path / "two").mkdir()
    for name in ("a.pt", "b.pt"):
        torch.save(transformer(), tmp_path / "two" / name)
    (tmp_path / "bad" / "google").mkdir(parents=True)
    (tmp_path / "bad" / "google" / "tokenizer.json").write_text("{")
    cases = {
        (tmp_path / "absent.pt", *ours): "absent.pt: there is no such file or folder",
        (tmp_path / "text.pt", *ours): "text.pt: not a readable checkpoint",
        (tmp_path / "empty", *ours): "empty: holds no files that are known here",
        (tmp_path / "two", *ours): "two: holds two transformers, a.pt and b.pt: name one",
        (tmp_path / "bad", *ours): "google: not a tokenizer that can be loaded",
        (wan, "-o", tmp_path / "text.pt", "--heads", HEADS): "text.pt: is no folder",
        (wan, "-o", tmp_path / "two", "--heads", HEADS): "two: holds something else; choose a new folder",
        (wan, "-o", tmp_path / "out"): "48 channels are no multiple of the usual 128",
        (wan, *ours, "--preset", "sora"): "there is no preset 'sora' of a published model; there are memflow-1.3b",
        (wan, *ours, "--keep-lora"): "--keep-lora is for one LoRA, 0 are given",
        (wan, *ours, "--lora-alpha", "0"): "--lora-alpha must be above 0, got 0.0",
        (wan, *ours, "--lora-alpha", "8"): "--lora-alpha: there is no LoRA among the given files",
        (tokenizer(tmp_path / "words"), *ours, "--partial"): "there is no model among the given files",
    }
    for arguments, message in cases.items():
        code, _, error = convert(capsys, *arguments)
        assert code == 2 and message in error, error
        assert not (tmp_path / "out").exists()


def test_no_room_is_said_first(wan, ours, tmp_path, capsys, monkeypatch):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(9, 9, 10))
    code, _, error = convert(capsys, wan, *ours)
    assert code == 2 and "out: needs 0.00 GB, and only 0.00 GB are free there" in error

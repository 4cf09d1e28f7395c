"""`memflow doctor --model`: what it computes from shapes is what a real stream allocates."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from written import HEADS, LISTS

from memflow import MemoryConfig
from memflow.cli import main
from memflow.cli.doctor import GIB, _parts, describe, options
from memflow.cli.loading import load_pipeline
from memflow.models.wan.float8 import float8_linears
from memflow.models.wan.footprint import _Peak
from memflow.models.wan.published import PRESETS
from memflow_bench.untrained import noise_pipeline


@pytest.fixture(scope="module")
def model(wan, tmp_path_factory):
    out = tmp_path_factory.mktemp("model") / "memflow"
    assert main(["convert", str(wan), "-o", str(out), "--heads", str(HEADS), "--preset", "memflow-1.3b"]) == 0
    return out


def doctor(capsys, *arguments):
    code = main(["doctor", "--model", *map(str, arguments)])
    output = capsys.readouterr()
    return code, output.out, output.err


def nbytes(tensors):
    return sum(tensor.nbytes for tensor in tensors)


@pytest.fixture(scope="module")
def found(model):
    from memflow.models.wan.footprint import footprint

    return footprint(describe(str(model), 32, 48), dtype=torch.bfloat16)


def test_exact_parts_are_what_a_stream_holds(model, found):
    pipe = load_pipeline(str(model), torch.device("cpu"), torch.bfloat16)
    stream = pipe.stream(["a fox runs"], seconds_per_prompt=2, height=32, width=48)
    next(stream), next(stream)
    assert found.transformer == nbytes(pipe.transformer.parameters())
    assert found.vae == nbytes(pipe.vae.parameters())
    assert found.text_encoder == nbytes(pipe.prompts._load_encoder().parameters())
    assert found.pool == nbytes(stream.memory.pool.state_dict().values())
    assert found.prompt == nbytes(stream.driver.in_force.prompt[:2])
    assert found.vae_cache == nbytes(t for t in stream.decoder.cache if isinstance(t, torch.Tensor))
    converted = [pipe.transformer.get_submodule(name).weight for name in float8_linears(pipe.transformer)]
    # A byte for each number, and torchao's float32 scale for each row.
    float8 = sum(weight.numel() + 4 * len(weight) for weight in converted)
    assert converted and found.transformer_float8 == found.transformer - nbytes(converted) + float8


def test_the_estimates_are_the_tensors_of_the_real_pass(model, found):
    pipe = load_pipeline(str(model), torch.device("cpu"), torch.bfloat16)
    stream = pipe.stream(["a fox runs"], seconds_per_prompt=4, height=32, width=48)
    for _ in range(5):  # sink and window are full
        next(stream)
    step = stream.memory.pass_over(15, 3, stream.driver.in_force.prompt)
    with torch.no_grad(), _Peak() as peak:
        stream.driver.model.denoise(torch.zeros(1, 16, 3, 4, 6, dtype=torch.bfloat16), 937.5, step)
    # The attention of the CPU reference makes tensors of its own, inside one operator of the run without data.
    assert found.denoising <= peak.peak
    with torch.no_grad(), _Peak() as peak:
        stream.decoder._frame(torch.zeros(1, 16, 1, 4, 6, dtype=torch.bfloat16))
    assert found.decoding == peak.peak


def test_the_tensors_alive_at_once_are_added_up():
    kilobyte = torch.zeros(256)
    with _Peak() as peak:
        a = kilobyte + 1
        b = a + 1
        del a
        b.view(2, 128).mul_(2)  # no memory of its own
        b = b + 1
    assert peak.peak == 2 * 1024
    holder = [torch.zeros(256)]
    with _Peak() as peak:
        holder[0] = holder[0] + 1  # takes the place of what was there before
        holder[0] = holder[0] + 1
    assert peak.peak == 1024


def test_published_sizes(capsys):
    """Against the recorded parameter list, the published file size of the encoder and the unit of docs/memory.md."""
    code, told, _ = doctor(capsys, "memflow-1.3b", "--gpu", "RTX-4090")
    assert code == 0
    sizes = {m[1]: float(m[2]) for m in re.finditer(r"^  (\w+(?: \w+)?) +(\d+\.\d\d)  ", told, re.MULTILINE)}
    entry = LISTS["wan2.1-t2v-1.3b"]
    assert 2 * entry["parameters"] / GIB <= sizes["transformer"] + 0.005 < 1.01 * 2 * entry["parameters"] / GIB
    assert sizes["text encoder"] == round(11_361_920_418 / GIB, 2)
    unit = 1560 * 1536 * 2
    assert sizes["pool"] == round(30 * 2 * (3 + 3 + 9 + 1) * unit * 1.0005 / GIB, 2)
    assert sizes["prompt"] == round(30 * 2 * 512 * 1536 * 2 / GIB, 2)
    assert "bank 3, sink 3, window 9 latent frames, and the pending one" in told
    assert "in all" in told and "RTX-4090" in told and told.count("fits\n") == 4


def test_the_pool_is_told_with_all_that_it_holds(found, model):
    memory = MemoryConfig(held_frames=7, activated=0.5, activation_block=4)
    told = {name: text for name, text, _ in _parts(found, replace(describe(str(model)), memory=memory))}["pool"]
    assert told.endswith("window 9 latent frames, 7 held, means of blocks of 4 tokens")


def test_what_fits_depends_on_the_card(model, found, capsys, monkeypatch):
    asked = []
    known = lambda described, dtype: asked.append((described, dtype)) or found  # noqa: E731
    monkeypatch.setattr("memflow.models.wan.footprint.footprint", known)
    small = ["--height", 32, "--width", 48]
    code, told, _ = doctor(capsys, model, *small, "--gpu", "1.01gb", "--dtype", "float32")
    assert code == 0 and "1.01 GiB" in told and told.count("fits\n") == 4 and "float32" in told
    described, dtype = asked.pop()
    assert (described.height, described.width, dtype) == (32, 48, torch.float32)
    card = type("Card", (), {"name": "Some GPU", "total_memory": GIB})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    code, told, _ = doctor(capsys, model, *small)
    assert code == 0 and "Some GPU" in told and told.count("no\n") == 4  # nothing to spare beside the reserve


def test_options_differ_by_what_they_are_about(found):
    sizes = dict(options(found))
    assert sizes["text encoder kept"] - sizes["prompts known already"] == found.text_encoder
    saved = found.transformer - found.transformer_float8
    assert sizes["prompts known already"] - sizes["prompts known, float8 linears"] == saved > 0
    assert max(found.denoising, found.recache, found.decoding) == found.peak() - found.resident()


@pytest.mark.parametrize("content", ["{", "[]", "{" + " " * 2**24 + "}"], ids=["cut", "a list", "without an end"])
def test_a_damaged_folder_is_one_line(tmp_path, capsys, content):
    for part in ("transformer", "vae", "text_encoder"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text("{}")
    (tmp_path / "model_index.json").write_text(content)
    code, told, error = doctor(capsys, tmp_path)
    assert code == 2 and f"--model {tmp_path}: {tmp_path / 'model_index.json'}: " in error and told == ""
    assert error.count("\n") == 1 and error.count("cannot be read") <= 1


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("model_index.json", '{"transformer": 3}'),
        ("model_index.json", '{"vae": []}'),
        ("model_index.json", '{"memory": 3}'),
        ("transformer/config.json", '{"num_layers": "two"}'),
        ("transformer/config.json", '{"patch_size": 2}'),
        ("vae/config.json", '{"z_dim": -1}'),
    ],
)
def test_settings_that_no_model_has_are_one_line(model, tmp_path, capsys, file, content):
    folder = shutil.copytree(model, tmp_path / "model")
    known = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(known | json.loads(content)))
    code, told, error = doctor(capsys, folder, "--height", 32, "--width", 48)
    assert code == 2 and error.startswith(f"memflow: --model {folder}: ") and error.count("\n") == 1 and told == ""


def test_wrong_requests_are_one_line(model, tmp_path, capsys):

    noise_pipeline().save_pretrained(tmp_path / "toy")
    cases = {
        ("nowhere",): "--model nowhere: neither the folder of a pipeline nor one of memflow-1.3b, longlive-1.3b",
        (tmp_path / "toy",): "not a Wan model with its VAE and UMT5, but WanTransformer3DModel, PixelShuffleCodec",
        (model, "--height", 40): "height must be a multiple of 16 pixels for this model, got 40",
        (model, "--gpu", "abacus"): "--gpu abacus: neither a number of GiB nor one of rtx-3060",
        (model, "--gpu", "-1"): "--gpu -1: neither a number",
    }
    for arguments, message in cases.items():
        code, told, error = doctor(capsys, *arguments)
        assert code == 2 and message in error and error.count("\n") == 1 and told == "", error


def test_presets_are_those_of_the_published_system():
    """The recorded semantics: a window of 12 that counts its sink of 3, a bank of 3, recorded every 3 chunks."""
    memflow, longlive, forcing = (PRESETS[name] for name in ("memflow-1.3b", "longlive-1.3b", "self-forcing-1.3b"))
    memory = memflow.memory_config
    assert memory == MemoryConfig.published("interactive", record_interval=3)
    assert (memory.sink_frames, memory.window_frames, memory.bank_frames, memory.record_interval) == (3, 9, 3, 3)
    assert (memory.published_mode, memory.top_k) == ("interactive", None)

    def frames(preset):
        config = preset.memory_config
        return config.sink_frames, config.window_frames, config.bank_frames

    assert frames(longlive) == (3, 9, 0)
    assert frames(forcing) == (0, 21, 0)
    infinity, framewise, krea = (
        PRESETS[name] for name in ("longlive-infinity-1.3b", "causal-forcing-framewise-1.3b", "krea-realtime-14b")
    )
    assert frames(infinity) == (3, 9, 0) and infinity.memory_config.positions == "relative"
    assert frames(framewise) == (0, 21, 0) and framewise.memory_config.frames_per_chunk == 1
    assert frames(krea) == (0, 6, 0) and krea.denoising_steps == (1000, 937, 833, 625) and krea.shift == 1.0
    few = {name: PRESETS[f"causal-forcing-{name}-1.3b"] for name in ("2step", "1step")}
    assert [preset.denoising_steps for preset in few.values()] == [(1000, 500), (1000,)]
    assert all(preset.memory == framewise.memory for preset in few.values())
    second = PRESETS["longlive2-5b"]
    assert frames(second) == (8, 24, 0) and second.memory_config.frames_per_chunk == 8 and second.fps == 24
    for preset in PRESETS.values():
        from memflow.stream.sampler import DistilledSchedule

        schedule = DistilledSchedule(preset.scheduler(), preset.first_denoising_steps or preset.denoising_steps)
        rounded = 1000 if preset.shift == 1 else 1  # a list of shifted timesteps has whole numbers
        assert schedule.sigmas == pytest.approx([1.0, 0.9375, 0.8333333, 0.625], abs=1e-6 * rounded)
        assert schedule.timesteps == pytest.approx([1000.0, 937.5, 833.3333, 625.0], abs=1e-3 * rounded)
        json.dumps(preset.settings())

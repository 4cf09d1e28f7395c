"""LoRAs of the original layouts: merged or kept beside the weights, the model computes the same."""

import json

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from test_convert import convert
from written import HEADS, lora, transformer

from memflow import MemFlowPipeline
from memflow.cli.loading import load_pipeline
from memflow.convert.lora import read_lora, write_lora
from memflow.errors import MemFlowError
from memflow.models.wan.checkpoints import layout_of, read_checkpoint


def as_peft(tensors):
    return {"generator_lora": {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}, "step": 3000}


def as_kohya(tensors):
    renamed = {name.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): t for name, t in tensors.items()}
    return {f"diffusion_model.{name}": tensor for name, tensor in renamed.items()}


def with_adapter_name(tensors):
    return {f"base_model.model.{name.replace('.weight', '.default.weight')}": t for name, t in tensors.items()}


LAYOUTS = {"bare": dict, "generator_lora": as_peft, "kohya": as_kohya, "adapter name": with_adapter_name}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The transformer alone."""
    path = tmp_path_factory.mktemp("base") / "base.pt"
    torch.save({"generator": transformer()}, path)
    return path


@pytest.fixture
def ours(tmp_path):
    return ["-o", tmp_path / "out", "--heads", HEADS, "--partial"]


def merged(tensors, scale):
    """scale(rank) * B @ A added to the weights of `transformer()`, in float64, by diffusers' names."""
    original = layout_of("transformer", transformer(), source="", num_attention_heads=HEADS).original
    weights = {name: tensor.double() for name, tensor in transformer().items()}
    for name, a in tensors.items():
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            b = tensors[f"{module}.lora_B.weight"].double()
            weights[f"{module}.weight"] = weights[f"{module}.weight"] + scale(len(a)) * (b @ a.double())
    return {new: weights[old] for new, old in original.items()}


def assert_close(folder, wanted):
    found = WanTransformer3DModel.from_pretrained(folder / "transformer").state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name].double(), tensor, atol=1e-6, rtol=1e-6, msg=name)


RANKS = [*((layout, 3) for layout in LAYOUTS), ("bare", 1), ("generator_lora", 256)]


@pytest.mark.parametrize(("layout", "rank"), RANKS)
def test_every_layout_and_rank_is_merged(layout, rank, base, ours, tmp_path, capsys):
    torch.save(LAYOUTS[layout](lora(rank)), tmp_path / "lora.pt")
    code, told, error = convert(capsys, base, tmp_path / "lora.pt", *ours)
    assert code == 0 and "10 updates, merged into the transformer, from lora.pt" in told
    assert "lora.pt: no alpha is known: the rank is taken, a scale of 1; --lora-alpha gives another" in error
    assert_close(tmp_path / "out", merged(lora(rank), lambda _: 1))


def test_alpha_from_the_command_line_the_file_or_peft(base, ours, tmp_path, capsys):
    plain = lora(4)
    alphas = {f"{name.removesuffix('.lora_A.weight')}.alpha": torch.tensor(6.0) for name in plain if "lora_A" in name}
    config = tmp_path / "adapter_config.json"
    cases = {
        "given": (plain, None, ["--lora-alpha", "2"], lambda rank: 2 / rank),
        "given over file": (plain | alphas, None, ["--lora-alpha", "2"], lambda rank: 2 / rank),
        "file": (plain | alphas, {"lora_alpha": 9}, [], lambda rank: 6 / rank),
        "config": (plain, {"lora_alpha": 9, "use_rslora": False}, [], lambda rank: 9 / rank),
        "rank-stabilised": (plain, {"lora_alpha": 9, "use_rslora": True}, [], lambda rank: 9 / rank**0.5),
    }
    for name, (tensors, peft_config, options, scale) in cases.items():
        save_file(tensors, tmp_path / "lora.safetensors")
        config.unlink(missing_ok=True)
        if peft_config:
            config.write_text(json.dumps(peft_config))
        out = tmp_path / name
        code, _, error = convert(capsys, base, tmp_path / "lora.safetensors", "-o", out, *ours[2:], *options)
        assert code == 0 and "no alpha is known" not in error
        assert_close(out, merged(plain, scale))


@pytest.mark.parametrize(("rank", "scale", "assumed"), [(4, 0.5, False), (3, 1.0, True)])
def test_alpha_of_the_preset_counts_for_its_own_rank(rank, scale, assumed, tmp_path):
    save_file(lora(rank), tmp_path / "lora.safetensors")
    found = read_lora(read_checkpoint(tmp_path / "lora.safetensors"), published=(4, 2.0))
    assert {update.scale for update in found.updates.values()} == {scale}
    assert found.assumed_alpha is assumed


def test_two_loras_add_up(base, ours, tmp_path, capsys):
    first, second = lora(2, seed=3), lora(5, seed=4, modules=("ffn.0", "cross_attn.k"))
    torch.save(first, tmp_path / "a.pt")
    torch.save(as_peft(second), tmp_path / "b.pt")
    assert convert(capsys, base, tmp_path / "a.pt", tmp_path / "b.pt", *ours)[0] == 0
    one, two, base = merged(first, lambda _: 1), merged(second, lambda _: 1), merged({}, lambda _: 1)
    assert_close(tmp_path / "out", {name: one[name] + two[name] - base[name] for name in base})


def test_a_lora_named_twice_counts_once(base, ours, tmp_path, capsys):
    (tmp_path / "hub").mkdir()
    torch.save(lora(2), tmp_path / "hub" / "lora.pt")
    code, told, _ = convert(capsys, base, tmp_path / "hub", tmp_path / "hub" / "lora.pt", *ours)
    assert code == 0 and told.count("merged into the transformer") == 1
    assert_close(tmp_path / "out", merged(lora(2), lambda _: 1))


def test_merged_equals_kept(wan, tmp_path, capsys):
    """Both folders compute the same to 1e-5; the kept LoRA comes through diffusers and peft, and does something."""
    torch.save(as_peft(lora(3)), tmp_path / "lora.pt")
    common = [wan, tmp_path / "lora.pt", "--heads", HEADS, "--lora-alpha", "5"]
    assert convert(capsys, *common, "-o", tmp_path / "merged")[0] == 0
    code, told, _ = convert(capsys, *common, "-o", tmp_path / "kept", "--keep-lora")
    assert code == 0 and "10 updates, written beside the transformer" in told
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(1, 16, 3, 8, 12, generator=generator), torch.tensor([937.5])
    text = torch.randn(1, 16, 24, generator=generator)
    flows = {}
    for name in ("merged", "kept"):
        pipe = load_pipeline(str(tmp_path / name), torch.device("cpu"), torch.float32)
        with torch.no_grad():
            flows[name] = pipe.transformer(*inputs, text).sample
    bare = MemFlowPipeline.from_pretrained(tmp_path / "kept")
    assert_close(tmp_path / "kept", merged({}, lambda _: 1))
    with torch.no_grad():
        flows["bare"] = bare.transformer(*inputs, text).sample
    torch.testing.assert_close(flows["kept"], flows["merged"], atol=1e-5, rtol=0)
    assert (flows["bare"] - flows["merged"]).abs().max() > 1e-2
    bare.load_lora_weights(tmp_path / "kept")
    with torch.no_grad():
        torch.testing.assert_close(bare.transformer(*inputs, text).sample, flows["merged"], atol=1e-5, rtol=0)


def test_half_precision_is_rounded_once(base, ours, tmp_path, capsys):
    save_file(lora(3), tmp_path / "lora.safetensors")
    assert convert(capsys, base, tmp_path / "lora.safetensors", *ours, "--dtype", "bfloat16")[0] == 0
    found = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    name = "blocks.1.attn1.to_q.weight"
    wanted = merged(lora(3), lambda _: 1)[name].bfloat16()
    assert (found[name] == wanted).float().mean() > 0.99  # float32 sums may fall on the other side of a tie


@pytest.mark.parametrize(("alpha", "kept"), [(2, torch.float32), (1.5, torch.bfloat16)])
def test_a_kept_lora_is_not_rounded_by_its_scale(alpha, kept, tmp_path):
    """2 / 3 of a bfloat16 is none; half of one is, and stays in the file's format."""
    save_file({name: tensor.bfloat16() for name, tensor in lora(3).items()}, tmp_path / "lora.safetensors")
    adapter = read_lora(read_checkpoint(tmp_path / "lora.safetensors"), alpha)
    write_lora(adapter, {name: name for name in adapter.updates}, tmp_path)
    found = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    for name, (_, b, scale) in adapter.updates.items():
        written = found[f"transformer.{name.removesuffix('.weight')}.lora_B.weight"]
        assert written.dtype == kept and torch.equal(written.float(), b.float() * scale)


@pytest.mark.parametrize("pattern", ["alpha_pattern", "rank_pattern"])
def test_patterns_of_peft_are_refused_by_name(pattern, tmp_path):
    save_file(lora(3), tmp_path / "lora.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 9, pattern: {"q": 4}}))
    with pytest.raises(MemFlowError, match=rf"adapter_config\.json: {pattern} is not known here"):
        read_lora(read_checkpoint(tmp_path / "lora.safetensors"))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 9, pattern: {}}))
    assert not read_lora(read_checkpoint(tmp_path / "lora.safetensors")).assumed_alpha


def test_an_alpha_that_is_no_number_is_refused(tmp_path):
    save_file(lora(3), tmp_path / "lora.safetensors")
    config = tmp_path / "adapter_config.json"
    for content, message in (
        ('{"lora_alpha": "nine"}', r"^lora\.safetensors: .*: alpha must be a number, got 'nine'"),
        ('{"lora_alpha": NaN}', r"alpha must be a number, got nan"),
        ("[9]", r"adapter_config\.json: must hold options by name, it holds a list"),
        ("[" * 100_000, r"adapter_config\.json: cannot be read"),
    ):
        config.write_text(content)
        with pytest.raises(MemFlowError, match=message):
            read_lora(read_checkpoint(tmp_path / "lora.safetensors"))


@pytest.mark.parametrize(("began", "known"), [("gaussian", True), (False, True), ("pissa_niter_4", False), ([], False)])
def test_a_lora_for_a_changed_base_is_refused(tmp_path, began, known):
    """peft's PiSSA and others take away from the base model what they begin with: without that it is another model."""
    save_file(lora(3), tmp_path / "lora.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 9, "init_lora_weights": began}))
    if known:
        assert read_lora(read_checkpoint(tmp_path / "lora.safetensors")).updates
        return
    with pytest.raises(MemFlowError, match=r"adapter_config\.json: init_lora_weights .* base model that was changed"):
        read_lora(read_checkpoint(tmp_path / "lora.safetensors"))


def test_an_adapter_config_without_end_is_refused(tmp_path):
    save_file(lora(3), tmp_path / "lora.safetensors")
    with open(tmp_path / "adapter_config.json", "wb") as file:
        file.truncate(2**30)
    with pytest.raises(MemFlowError, match=r"has 1,073,741,824 bytes, at most 1,048,576 are read"):
        read_lora(read_checkpoint(tmp_path / "lora.safetensors"))


def test_an_alpha_of_zero_is_an_alpha(tmp_path):
    save_file(lora(3), tmp_path / "lora.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 0}')
    found = read_lora(read_checkpoint(tmp_path / "lora.safetensors"))
    assert {update.scale for update in found.updates.values()} == {0} and not found.assumed_alpha


def test_another_scale_is_another_conversion(base, ours, tmp_path, capsys):
    save_file(lora(3), tmp_path / "lora.safetensors")
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({"lora_alpha": 9}))
    assert convert(capsys, base, tmp_path / "lora.safetensors", *ours)[0] == 0
    config.write_text(json.dumps({"lora_alpha": 9, "r": 3}))
    assert convert(capsys, base, tmp_path / "lora.safetensors", *ours)[0] == 0, "the same scale continues"
    config.write_text(json.dumps({"lora_alpha": 6}))
    code, _, error = convert(capsys, base, tmp_path / "lora.safetensors", *ours)
    assert code == 2 and "holds another conversion" in error


def spoiled(**changes):
    return {name: tensor for name, tensor in (lora(3) | changes).items() if tensor is not None}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (spoiled(**{"blocks.0.ffn.2.lora_B.weight": None}), r"1 missing tensors: blocks\.0\.ffn\.2\.lora_B$"),
        (spoiled(**{"blocks.0.ffn.2.lora_A.weight": None}), r"1 missing tensors: blocks\.0\.ffn\.2\.lora_A$"),
        (spoiled(other=torch.zeros(1)), r"1 unexpected tensors: other$"),
        (spoiled(**{"blocks.0.attn.alpha": torch.tensor(1.0)}), r"1 unexpected tensors: blocks\.0\.attn\.alpha$"),
        (
            spoiled(
                **{
                    "blocks.0.ffn.2.lora_A.weight": torch.zeros(0, 40),
                    "blocks.0.ffn.2.lora_B.weight": torch.zeros(48, 0),
                }
            ),
            r"ffn\.2: lora_A \[0, 40\] and lora_B \[48, 0\]",
        ),
        (
            spoiled(**{"blocks.0.ffn.2.lora_A.weight": torch.zeros(4, 40)}),
            r"ffn\.2: lora_A \[4, 40\] and lora_B \[48, 3\]",
        ),
    ],
)
def test_broken_loras_are_named(tensors, message, tmp_path):
    torch.save(tensors, tmp_path / "lora.pt")
    with pytest.raises(MemFlowError, match=rf"^lora\.pt: .*{message}"):
        read_lora(read_checkpoint(tmp_path / "lora.pt"))


def test_loras_of_another_model_are_refused(base, ours, tmp_path, capsys):
    other = {name.replace("blocks.0", "blocks.7"): tensor for name, tensor in lora(3).items()}
    torch.save(other, tmp_path / "deep.pt")
    torch.save(spoiled(**{"blocks.0.ffn.2.lora_A.weight": torch.zeros(3, 41)}), tmp_path / "wide.pt")
    code, _, error = convert(capsys, base, tmp_path / "deep.pt", *ours)
    assert code == 2 and "deep.pt: the transformer has no weights of these names: blocks.7.cross_attn.o.weight" in error
    code, _, error = convert(capsys, base, tmp_path / "wide.pt", *ours)
    assert code == 2 and "1 misshapen updates: blocks.0.ffn.2.weight [48, 41] (needs [48, 40])" in error
    code, _, error = convert(capsys, tmp_path / "deep.pt", *ours)
    assert code == 2 and "there is no model among the given files" in error
    assert not (tmp_path / "out").exists()

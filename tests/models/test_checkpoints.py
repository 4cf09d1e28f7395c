import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from memflow.errors import MemFlowError
from memflow.models.wan.checkpoints import layout_of, load_transformer

DATA = Path(__file__).parents[1] / "golden" / "data"
WEIGHTS = DATA / "model_weights.safetensors"
HEADS = 4

# Written out here, so that a slip in the library's mapping cannot hide: original module -> diffusers' module.
OUTER = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
}
ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}
BLOCK = {
    **{f"self_attn.{old}": f"attn1.{new}" for old, new in ATTENTION.items()},
    **{f"cross_attn.{old}": f"attn2.{new}" for old, new in ATTENTION.items()},
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "norm3": "norm2",
}


def diffusers_name(original: str) -> str:
    if original == "head.modulation":
        return "scale_shift_table"
    if original.endswith(".modulation"):
        return original.replace("modulation", "scale_shift_table")
    module, kind = original.rsplit(".", 1)
    if not module.startswith("blocks."):
        return f"{OUTER[module]}.{kind}"
    _, index, inner = module.split(".", 2)
    return f"blocks.{index}.{BLOCK[inner]}.{kind}"


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return load_file(WEIGHTS)


def assert_holds(model, weights) -> None:
    state = model.state_dict()
    assert {diffusers_name(name) for name in weights} == state.keys()
    for name, tensor in weights.items():
        assert torch.equal(state[diffusers_name(name)], tensor), name


def test_every_parameter_arrives(weights):
    model = load_transformer(WEIGHTS, num_attention_heads=HEADS)
    assert_holds(model, weights)
    expected = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 4,
        "attention_head_dim": 24,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 32,
        "freq_dim": 256,
        "ffn_dim": 192,
        "num_layers": 3,
    }
    assert {name: model.config[name] for name in expected} == expected
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"cpu"}


def test_the_model_runs():
    model = load_transformer(WEIGHTS, num_attention_heads=HEADS)
    latents, text = torch.randn(1, 16, 3, 8, 12), torch.randn(1, 16, 32)
    with torch.no_grad():
        flow = model(latents, torch.tensor([1000.0]), text).sample
    assert flow.shape == latents.shape
    assert flow.isfinite().all()


WRAPPED = {
    "bare": lambda tensors: tensors,
    "model": lambda tensors: {"model": tensors, "step": 7},
    "generator": lambda tensors: {"generator": {f"model.{name}": t for name, t in tensors.items()}, "critic": {}},
    "fsdp": lambda tensors: {
        "generator": {
            f"model._fsdp_wrapped_module.{name.replace('attn.', 'attn._fsdp_wrapped_module.')}": tensor
            for name, tensor in tensors.items()
        }
    },
    "averaged": lambda tensors: {
        "generator": {name: tensor + 1 for name, tensor in tensors.items()},
        "generator_ema": tensors,
    },
}


@pytest.mark.parametrize("layout", list(WRAPPED))
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_wrappers_and_prefixes_come_off(weights, layout, legacy, tmp_path):
    path = tmp_path / "checkpoint.pt"
    torch.save(WRAPPED[layout](weights), path, _use_new_zipfile_serialization=not legacy)
    assert_holds(load_transformer(path, num_attention_heads=HEADS), weights)


def test_dtype_is_that_of_from_pretrained(weights, tmp_path):
    model = load_transformer(WEIGHTS, num_attention_heads=HEADS, dtype=torch.bfloat16)
    load_transformer(WEIGHTS, num_attention_heads=HEADS).save_pretrained(tmp_path)
    expected = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16).state_dict()
    assert {name: tensor.dtype for name, tensor in model.state_dict().items()} == {
        name: tensor.dtype for name, tensor in expected.items()
    }
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("published", ["wan2.1-t2v-1.3b", "wan2.1-t2v-14b"])
def test_published_names_map_one_to_one(published):
    entry = json.loads((DATA / "wan_parameter_names.json").read_text())[published]
    tensors = {name: torch.empty(shape, device="meta") for name, shape in entry["tensors"].items()}
    model, original, _ = layout_of("transformer", tensors, source="file")
    assert original == {diffusers_name(name): name for name in tensors}
    assert {n: p.shape for n, p in model.named_parameters()} == {n: tensors[old].shape for n, old in original.items()}
    assert sum(parameter.numel() for parameter in model.parameters()) == entry["parameters"]
    config, sizes = model.config, entry["config"]
    assert config.num_attention_heads == sizes["num_heads"]
    assert (config.attention_head_dim, config.ffn_dim, config.num_layers) == (
        128,
        sizes["ffn_dim"],
        sizes["num_layers"],
    )


def changed(weights, **changes) -> dict[str, torch.Tensor]:
    """A copy with entries replaced, or left out where None."""
    return {name: tensor for name, tensor in {**weights, **changes}.items() if tensor is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks.1.ffn.2.bias": None}, r"1 missing tensors: blocks\.1\.ffn\.net\.2\.bias$"),
        ({"patch_embedding.weight": None}, r"without patch_embedding\.weight the size of the model is not known$"),
        ({"ctrl_emb.proj.0.weight": torch.zeros(2)}, r"1 unexpected tensors: ctrl_emb\.proj\.0\.weight$"),
        ({"img_emb.proj.0.weight": torch.zeros(2)}, r"is an image-to-video model \(img_emb\.proj\.0\.weight\)"),
        ({"blocks.9.norm3.bias": torch.zeros(96)}, r"missing tensors: .*blocks\.3\..* and \d+ more$"),
        ({"blocks.2.cross_attn.v.bias": torch.zeros(95)}, r"blocks\.2\.cross_attn\.v\.bias \[95\] \(needs \[96\]\)$"),
        (
            {"patch_embedding.weight": torch.zeros(96, 64)},
            r"patch_embedding\.weight \[96, 64\] \(needs 5 dimensions\)$",
        ),
        (
            {"text_embedding.0.weight": torch.zeros(90, 32)},
            r"text_embedding\.0\.weight \[90, 32\] \(needs \[96, 32\]\)$",
        ),
        ({"model.head.head.bias": torch.zeros(64)}, r"head\.head\.bias is there twice"),
    ],
)
def test_wrong_tensors_are_named(weights, changes, message, tmp_path):
    path = tmp_path / "wrong.safetensors"
    save_file(changed(weights, **changes), path)
    with pytest.raises(MemFlowError, match=message) as error:
        load_transformer(path, num_attention_heads=HEADS)
    assert str(error.value).startswith("wrong.safetensors: ")


def test_heads_that_shapes_do_not_tell_are_asked_for():
    with pytest.raises(MemFlowError, match=r"96 channels .* pass num_attention_heads"):
        load_transformer(WEIGHTS)
    for heads in (7, 0, -1):
        with pytest.raises(MemFlowError, match=f"num_attention_heads={heads} does not divide"):
            load_transformer(WEIGHTS, num_attention_heads=heads)


class Unsafe:
    def __reduce__(self):
        return print, ("code of the file ran",)


def test_files_that_are_no_checkpoints(tmp_path, capsys):
    cases = {
        "config.json": ("{}", "is a .safetensors, .pth or .pt file"),
        "text.safetensors": ("not tensors", "not a readable checkpoint"),
        "text.pth": ("not tensors", "not a readable checkpoint"),
        "empty.pt": ("", "not a readable checkpoint"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(MemFlowError, match=message):
            load_transformer(tmp_path / name)
    with pytest.raises(MemFlowError, match="no such file"):
        load_transformer(tmp_path / "absent.pth")
    for content, message in (([1], "a list"), ({"lr": 3}, "lr: not tensors"), (Unsafe(), "not a readable checkpoint")):
        torch.save(content, tmp_path / "other.pt")
        with pytest.raises(MemFlowError, match=message):
            load_transformer(tmp_path / "other.pt")
    assert "code of the file ran" not in capsys.readouterr().out

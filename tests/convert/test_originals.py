"""Files are recognised by their tensors, and taken out of what training put around them."""

import pytest
import torch
from safetensors.torch import save_file
from written import HEADS, lora, text_encoder, transformer, vae

from memflow.errors import MemFlowError
from memflow.models.wan import checkpoints
from memflow.models.wan.checkpoints import layout_of, load_transformer, read_checkpoint

FILES = {"transformer": transformer, "text_encoder": text_encoder, "vae": vae, "lora": lora}


def prefixed(prefix, tensors):
    return {prefix + name: tensor for name, tensor in tensors.items()}


WRAPPERS = {
    "bare": lambda tensors: tensors,
    "model": lambda tensors: {"model": tensors},
    "state_dict": lambda tensors: {"state_dict": prefixed("_orig_mod._checkpoint_wrapped_module.", tensors)},
    "generator": lambda tensors: {"generator": prefixed("model.", tensors), "critic": {}, "step": 600},
    "generator_ema": lambda tensors: {
        "generator": {},
        "generator_ema": prefixed("model._fsdp_wrapped_module.", tensors),
    },
    "peft": lambda tensors: prefixed("base_model.model.", tensors),
    "generator_lora": lambda tensors: {
        "generator_lora": prefixed("base_model.model.model.", tensors),
        "critic_lora": prefixed("base_model.model.", {name: tensor + 1 for name, tensor in tensors.items()}),
    },
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_recognised_whatever_is_around_it(tmp_path, kind, wrapper, legacy):
    tensors = FILES[kind]()
    torch.save(WRAPPERS[wrapper](tensors), tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    found = read_checkpoint(tmp_path / "a.pt")
    assert found.kind == kind
    assert found.tensors.keys() == tensors.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("kind", FILES)
def test_safetensors_too(tmp_path, kind):
    save_file(FILES[kind](), tmp_path / "a.safetensors")
    assert read_checkpoint(tmp_path / "a.safetensors").kind == kind


def test_other_files_are_named_with_what_they_hold(tmp_path):
    save_file({"visual.proj": torch.zeros(2)}, tmp_path / "clip.safetensors")
    with pytest.raises(MemFlowError, match=r"clip\.safetensors: neither .* its 1 tensors are visual\.proj$"):
        read_checkpoint(tmp_path / "clip.safetensors")


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_more_tensors_than_any_model_has_are_not_read(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(checkpoints, "_MOST_TENSORS", 60)
    path = tmp_path / f"many.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(transformer(), path)
    with pytest.raises(MemFlowError, match=r"many\.\w+: holds \d\d tensors, at most 60 are read"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (3, r"a\.pt: 3: not tensors by name"),
        ("blocks.99999999.norm3.weight", r"a\.pt: blocks\.99999999: a model has at most 1000 blocks here"),
        (f"blocks.{'9' * 5000}.norm3.weight", r"a\.pt: blocks\.9{20}: a model has at most 1000"),
        ("motion_encoder.enc.net_app.convs.0.bias", r"a\.pt: the names of its tensors cannot be mapped"),
    ],
)
def test_names_that_no_model_has(tmp_path, name, message):
    torch.save(transformer() | {name: torch.zeros(1)}, tmp_path / "a.pt")
    with pytest.raises(MemFlowError, match=message):
        load_transformer(tmp_path / "a.pt", num_attention_heads=HEADS)


@pytest.mark.parametrize(
    "extra",
    [
        {"img_emb.proj.0.weight": torch.zeros(4)},
        {"blocks.0.cross_attn.k_img.weight": torch.zeros(4, 4)},
        {"patch_embedding.weight": torch.zeros(96, 36, 1, 2, 2)},
    ],
    ids=["image embedding", "image keys", "channels of an image"],
)
def test_a_part_of_an_image_to_video_model_is_no_model(extra):
    tensors = transformer() | extra
    with pytest.raises(MemFlowError, match=r"i2v\.pt: is an image-to-video model"):
        layout_of("transformer", tensors, source="i2v.pt", num_attention_heads=HEADS, partial=True)


def test_a_size_of_nothing_is_refused(tmp_path):
    empty = {"patch_embedding.weight": torch.zeros(0, 16, 1, 2, 2), "blocks.0.attn.q.weight": torch.zeros(0, 24)}
    empty["blocks.0.pos_embedding.embedding.weight"] = torch.zeros(32, 0)
    for kind, tensors in (("transformer", transformer()), ("text_encoder", text_encoder())):
        for name in empty.keys() & tensors.keys():
            with pytest.raises(
                MemFlowError, match=rf"^a: 1 misshapen tensors: {name} \[.*\(needs \d dim.* of them 0\)"
            ):
                layout_of(kind, tensors | {name: empty[name]}, source="a")


def test_a_model_of_another_kind_is_no_transformer(tmp_path):
    save_file(vae(), tmp_path / "vae.safetensors")
    with pytest.raises(MemFlowError, match=r"^vae\.safetensors: holds no transformer but a vae$"):
        load_transformer(tmp_path / "vae.safetensors")

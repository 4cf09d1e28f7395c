"""Every original name has its place in a library model: at the published sizes, on the meta device."""

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan
from transformers import UMT5Config, UMT5EncoderModel
from written import LISTS, umt5_name, vae_2_2_names, vae_table

from memflow.errors import MemFlowError
from memflow.models.wan import WAN_2_2_VAE
from memflow.models.wan.checkpoints import layout_of

TIED = "encoder.embed_tokens.weight"  # the same tensor as shared.weight


def meta(shapes) -> dict[str, torch.Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def published_umt5() -> dict[str, list[int]]:
    """umt5-xxl: 24 layers of 4096 channels, 64 heads, 10240 wide, 256384 pieces (Wan2.1, wan/modules/t5.py)."""
    square, wide = [4096, 4096], [10240, 4096]
    block = {"norm1": [4096], "norm2": [4096], "pos_embedding.embedding": [32, 64]}
    block |= {"ffn.gate.0": wide, "ffn.fc1": wide, "ffn.fc2": wide[::-1], **{f"attn.{x}": square for x in "qkvo"}}
    shapes = {f"blocks.{i}.{name}.weight": shape for i in range(24) for name, shape in block.items()}
    return {"token_embedding.weight": [256384, 4096], **shapes, "norm.weight": [4096]}


def assert_one_to_one(layout, tensors, new_name, reference) -> None:
    assert layout.original == {new_name(old): old for old in tensors}
    wanted = {name: parameter.shape for name, parameter in reference.named_parameters() if name != TIED}
    assert {name: tensors[old].shape for name, old in layout.original.items()} == wanted
    assert {name: p.shape for name, p in layout.model.named_parameters() if name != TIED} == wanted


def test_the_vae_maps_one_to_one():
    table = vae_table()
    tensors = meta({name: shape for name, (_, shape) in table.items()})
    with init_empty_weights():
        reference = AutoencoderKLWan()
    layout = layout_of("vae", tensors, source="file")
    assert len(tensors) == 194
    assert_one_to_one(layout, tensors, lambda old: table[old][0], reference)
    assert {k: v for k, v in layout.model.config.items() if k[0] != "_"} == {
        k: v for k, v in reference.config.items() if k[0] != "_"
    }


def test_the_vae_of_wan_2_2_maps_one_to_one():
    names = vae_2_2_names()
    with init_empty_weights():
        reference = AutoencoderKLWan(**WAN_2_2_VAE)
    shapes = {name: tensor.shape for name, tensor in reference.state_dict().items()}
    tensors = meta({old: shapes[new] for old, new in names.items()})
    layout = layout_of("vae", tensors, source="file")
    assert len(tensors) == len(shapes) == 196
    assert_one_to_one(layout, tensors, names.get, reference)
    assert {**layout.model.config} == {**reference.config}


def test_the_text_encoder_maps_one_to_one():
    tensors = meta(published_umt5())
    config = UMT5Config(vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)
    with init_empty_weights():
        reference = UMT5EncoderModel(config)
    layout = layout_of("text_encoder", tensors, source="file")
    assert len(tensors) == 242
    assert_one_to_one(layout, tensors, umt5_name, reference)
    for name in ("d_kv", "d_ff", "num_heads", "num_layers", "dense_act_fn", "is_gated_act"):
        assert getattr(layout.model.config, name) == getattr(config, name), name


WRONG = {
    "vae": ("decoder.upsamples.4.shortcut.bias", "encoder.downsamples.8.time_conv.weight"),
    "text_encoder": ("blocks.1.ffn.gate.0.weight", "blocks.23.pos_embedding.embedding.weight"),
    "transformer": ("blocks.29.modulation", "blocks.7.cross_attn.norm_q.weight"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_is_named_or_left_out(kind):
    shapes = {
        "vae": {name: shape for name, (_, shape) in vae_table().items()},
        "text_encoder": published_umt5(),
        "transformer": LISTS["wan2.1-t2v-1.3b"]["tensors"],
    }[kind]
    missing, misshapen = WRONG[kind]
    good = meta(shapes)
    bad = {name: tensor for name, tensor in good.items() if name != missing}
    there = layout_of(kind, good, source="f").original
    (new,) = (new for new, old in there.items() if old == missing)
    with pytest.raises(MemFlowError, match=rf"^f: 1 missing tensors: {new}$"):
        layout_of(kind, bad, source="f")
    extra = torch.empty(1, device="meta")
    with pytest.raises(MemFlowError, match=r"^f: 1 unexpected tensors: stranger$"):
        layout_of(kind, good | {"stranger": extra}, source="f")
    with pytest.raises(MemFlowError, match=rf"^f: 1 misshapen tensors: {misshapen} \[1\] \(needs \["):
        layout_of(kind, good | {misshapen: extra}, source="f")
    found = layout_of(kind, bad | {"stranger": extra, misshapen: extra}, source="f", partial=True)
    assert len(found.notes) == 3
    assert set(found.original.values()) == good.keys() - {missing, misshapen}


def test_what_tells_the_size_is_needed_even_of_a_part():
    tensors = meta({name: shape for name, (_, shape) in vae_table().items() if name != "conv2.weight"})
    with pytest.raises(MemFlowError, match=r"f: without conv2.weight the size of the model is not known"):
        layout_of("vae", tensors, source="f", partial=True)


def test_another_vae_is_refused():
    shapes = {name: [24 if size == 16 else size for size in shape] for name, (_, shape) in vae_table().items()}
    with pytest.raises(MemFlowError, match=r"a VAE of 24 latent channels; that of Wan 2\.1 has 16"):
        layout_of("vae", meta(shapes), source="f")

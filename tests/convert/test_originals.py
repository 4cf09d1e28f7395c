"""Files are recognised by their tensors, and taken out of what training put around them."""

import pytest
import torch
from safetensors.torch import save_file
from written import lora, text_encoder, transformer, vae

from memflow.errors import MemFlowError
from memflow.models.wan.originals import read_checkpoint

FILES = {"transformer": transformer, "text_encoder": text_encoder, "vae": vae, "lora": lora}


def prefixed(prefix, tensors):
    return {prefix + name: tensor for name, tensor in tensors.items()}


WRAPPERS = {
    "bare": lambda tensors: tensors,
    "model": lambda tensors: {"model": tensors},
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

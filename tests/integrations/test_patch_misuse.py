"""What is no model, no number of heads or no option is named before anything is patched."""

import pytest
import torch
from causal_wan import StoringModel
from torch import nn

from memflow.integrations import patch


@pytest.mark.parametrize("heads", [0, -2, 2.0, True, "2", torch.tensor(2)])
def test_the_number_of_heads_is_a_whole_number(heads):
    model = StoringModel()
    model.blocks[-1].self_attn.num_heads = heads
    with pytest.raises(ValueError, match=r"blocks\.1\.self_attn\.num_heads: must be a whole number of at least 1, got"):
        patch(model)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"returns": 5}, "returns: must be a function of a PatchedCall, got 5"),
        ({"check_tolerance": "0.1"}, "check_tolerance must be between 0 and 1, got '0.1'"),
    ],
)
def test_a_wrong_option_is_named(options, said):
    with pytest.raises(ValueError, match=said):
        patch(StoringModel(), **options)


@pytest.mark.parametrize("model", [None, nn.Linear])
def test_what_is_no_module_is_named(model):
    with pytest.raises(ValueError, match=r"model: must be a torch\.nn\.Module, got"):
        patch(model)

from dataclasses import replace

import pytest
import torch
from written import HEADS, LAYERS

from memflow import convert
from memflow.models.wan.published import MODELS

TINY = {"num_attention_heads": HEADS, "attention_head_dim": 48 // HEADS, "ffn_dim": 40, "num_layers": LAYERS}


@pytest.fixture(autouse=True, scope="package")
def tiny_presets():
    """The published models, whose presets the tests convert with, have the sizes of the tests' files."""
    with pytest.MonkeyPatch.context() as patch:
        rows = {name: replace(row, transformer={**row.transformer, **TINY}) for name, row in MODELS.items()}
        patch.setattr(convert, "MODELS", rows)
        yield


@pytest.fixture(autouse=True)
def one_thread():
    """Everything here is too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def wan(tmp_path_factory):
    """A folder in the layout of the published Wan 2.1 repository."""
    from written import wan_folder

    return wan_folder(tmp_path_factory.mktemp("hub") / "Wan2.1-T2V-1.3B")

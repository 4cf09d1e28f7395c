"""Without a GPU the Triton kernels run through Triton's interpreter, which must be chosen before triton is imported."""

import os

import pytest
import torch

from memflow_kernels.cuda.builder import CACHE_VARIABLE, cache_folder

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory):
    """Tests leave nothing in the cache of whoever runs them. Where there is a GPU the built CUDA library stays where it
    is: every process would build its own, for minutes."""
    if torch.cuda.is_available():
        os.environ.setdefault(CACHE_VARIABLE, str(cache_folder()))
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture(scope="session")
def toy():
    """The tiny untrained model. Streams share it: they keep everything of their own to themselves."""
    from memflow_bench.untrained import noise_pipeline

    pipeline = noise_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline

import shutil

import pytest
from films import NOISE

from memflow_bench.untrained import noise_pipeline


@pytest.fixture(scope="session", autouse=True)
def noise_folder():
    """The tiny model of random weights as a folder, for `--model`."""
    noise_pipeline().save_pretrained(NOISE)
    yield
    shutil.rmtree(NOISE)

"""Settings of the benchmark tests: one thread, no gradients, sizes that a test can afford."""

from dataclasses import replace

import pytest
import torch

from memflow_bench.cases import Case, case


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny() -> Case:
    """Batch 2, 2 heads of 12 channels, frames of 3 x 5 tokens."""
    return replace(case("toy"), batch=2, heads=2, head_dim=12, grid=(3, 5), text_tokens=7, top_k=2)

"""Settings of the kernel tests: the same examples on every run, no wall-clock deadlines, one thread."""

import pytest
import torch
from hypothesis import settings

settings.register_profile("kernels", derandomize=True, deadline=None, max_examples=30, database=None)


@pytest.fixture(autouse=True, scope="package")
def _kernel_settings():
    """Tiny tensors: more threads than one only cost time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

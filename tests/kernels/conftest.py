"""Settings of the kernel tests: the same examples on every run, no wall-clock deadlines, one thread, every backend."""

import sys

import host_build
import interpreter
import pytest
import torch
from host_ops import HostOps
from hypothesis import HealthCheck, settings

from memflow_kernels import available_backends, use_backend
from memflow_kernels.backends import interpreting
from memflow_kernels.cuda import extension

# The backend is the same for all examples of a test, so that it need not be set up for each.
settings.register_profile(
    "kernels",
    derandomize=True,
    deadline=None,
    max_examples=30,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

if interpreting() and available_backends()["triton"] is None:
    interpreter.repair()


@pytest.fixture(autouse=True, scope="package")
def _kernel_settings():
    """Tiny tensors: more threads than one only cost time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _launches_planned_anew():
    """Tests change the tables of configurations; launches planned by those are nobody else's."""
    yield
    attention = sys.modules.get("memflow_kernels.triton.attention")
    if attention is not None:
        attention.planned.cache_clear()


@pytest.fixture(params=["torch", "triton", *(["cuda"] if torch.cuda.is_available() else [])])
def backend(request):
    """The test runs once on every backend; one that cannot run here is skipped and says why.

    The compiled kernels join in where there is a GPU; elsewhere tests of their own run them on the CPU. It is a failure
    that they cannot be built or loaded: other kernels would run in their place.
    """
    reason = available_backends()[request.param]
    if reason is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    if request.param == "cuda":
        assert extension.unloadable() is None
        assert extension.not_compiled_for(torch.cuda.current_device()) is None
    on_gpu = request.param == "cuda" or (request.param == "triton" and not interpreting())
    torch.set_default_device("cuda" if on_gpu else None)
    with use_backend(request.param):
        yield request.param
    torch.set_default_device(None)


@pytest.fixture(scope="session")
def host_library():
    """The host build of csrc/, made once for all workers."""
    reason = host_build.missing()
    if reason is not None:
        pytest.skip(f"CUDA kernels on the CPU: {reason}")
    return host_build.library()


@pytest.fixture(scope="module")
def host(host_library):
    """The ops by the CUDA kernels, on the CPU, under AddressSanitizer and UBSan."""
    process = host_build.Process(host_library)
    yield HostOps(process)
    process.close()

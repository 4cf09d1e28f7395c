"""What callers of a library set in torch: contexts that no result may depend on."""

import warnings
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
        assert torch.get_default_dtype() == dtype, "the caller's setting is as it was"
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def seeded():
    """Another state of the global generator, which is left as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1234)
        before = torch.get_rng_state()
        yield
        assert torch.equal(torch.get_rng_state(), before)


@contextmanager
def strict_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


WORLDS = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "meta device": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "gradients": torch.enable_grad,
    "no gradients": torch.no_grad,
    "deterministic algorithms": deterministic,
    "another seed": seeded,
    "anomaly detection": lambda: torch.autograd.set_detect_anomaly(True, check_nan=True),
    "warnings are errors": strict_warnings,
}


@contextmanager
def all_of_them():
    with ExitStack() as stack:
        for name in ("float64", "meta device", "inference mode", "autocast", "deterministic algorithms"):
            stack.enter_context(WORLDS[name]())
        yield


WORLDS["several at once"] = all_of_them

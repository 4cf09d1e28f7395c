"""A story told through Triton's interpreter is the story told on the CPU."""

import numpy as np
import pytest
from films import NOISE, decode

from memflow.cli import main
from memflow_kernels import available_backends, backends
from memflow_kernels.backends import interpreting

# Two chunks: the second remembers the first, and its heads choose two of three frames.
STORY = ["--prompt", "A keeper with a red scarf.", "--prompt", "A cat on the rail.", "--seconds-per-prompt", "0.75"]
TINY = ["--model", NOISE, "--height", "16", "--width", "16", "--device", "cpu", "--top-k", "2"]


def test_a_gpu_backend_on_the_cpu_is_refused(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(backends.BACKENDS, "triton", backends.BACKENDS["torch"])  # as on a machine with a GPU
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert main(["generate", *STORY, *TINY, "--backend", "triton", "-o", str(tmp_path / "a.mp4")]) == 2
    assert "--backend triton: the backend 'triton' runs on a GPU, not on the CPU" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not interpreting(), reason="on the CPU Triton's kernels need TRITON_INTERPRET=1")
def test_two_chunks_are_the_same_on_both_backends(tmp_path):
    reason = available_backends()["triton"]
    if reason is not None:
        pytest.skip(f"backend triton: {reason}")
    films = []
    for backend in ("torch", "triton"):
        path = tmp_path / f"{backend}.mp4"
        assert main(["generate", *STORY, *TINY, "--backend", backend, "-o", str(path)]) == 0
        films.append(decode(path).astype(int))
    assert films[0].shape == (24, 16, 16, 3)
    assert np.abs(films[0] - films[1]).max() <= 1

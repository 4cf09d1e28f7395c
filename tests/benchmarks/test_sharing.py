"""The bytes of the cost model are those that processes exchange."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from benchmarks import sharing

sys.path.insert(0, str(Path(__file__).parents[1] / "parallel"))
import together


def counted() -> list[int]:
    """Bytes that this process sends to others in each exchange of one denoising call."""
    from memflow.parallel import ranks

    pipe, found, exchange = together.pipeline(), [], ranks._exchanged
    pipe.enable_parallelism()
    stream = pipe.stream(["a boat"], height=32, width=32, seconds_per_prompt=0.75)
    embeds, mask = pipe.encode(["a boat"])
    stream.driver.prompt(embeds, mask)

    def noted(parts):
        found.append((parts.numel() - parts[0].numel()) * parts.itemsize)
        return exchange(parts)

    ranks._exchanged = noted
    stream.driver.denoise(torch.zeros(1, *stream.latent_shape), 1000.0)
    return found


@pytest.mark.parametrize("processes", [2, 4])
def test_bytes_of_a_layer(processes, monkeypatch):
    size = sharing.Size("small", 2, 4, 64)
    monkeypatch.setattr(sharing, "BYTES", 4)
    monkeypatch.setattr(sharing, "width", lambda size: 4 * 12)
    for found in together.run(processes, counted):
        assert len(found) == 4  # two layers
        assert found[0] + found[1] == found[2] + found[3] == sharing.sent(size, processes, tokens=48)


def test_the_table():
    small, large = sharing.SIZES
    assert sharing.numbers(small) == [2, 3, 4, 6, 12] and sharing.numbers(large) == [2, 4, 5, 8, 10, 20, 40]
    assert sharing.chunk(small, 4, 3e11) < sharing.chunk(small, 2, 3e11) < sharing.chunk(small, 1, 1.0)
    for size in sharing.SIZES:
        for n in sharing.numbers(size):
            least = sharing.least_bandwidth(size, n)
            assert (
                sharing.chunk(size, n, 1.01 * least)
                < sharing.chunk(size, 1, 1.0)
                < sharing.chunk(size, n, 0.99 * least)
            )
    written = Path(sharing.__file__).parent / "results" / "sharing.md"
    assert written.read_text() == sharing.tables()


def measured() -> dict[str, float]:
    from memflow.parallel.ranks import Ranks

    return sharing.measure(sharing.Size("small", 1, 2, 16), Ranks(), head_dim=12, latents=(4, 4))


def test_measuring():
    """On whatever is here: that it runs."""
    for found in together.run(2, measured):
        assert found["chunk"] > found["exchange"] > 0

"""What a captured pass is known by: all that it fixes, on any machine."""

import torch

from memflow.models.wan.graphs import _size

SMALL = {"height": 32, "width": 32}


def test_a_graph_is_not_replayed_for_another_pool(toy):
    """Two streams of the same sizes: a graph reads the pool where it lay when it was captured."""
    sizes = []
    streams = [toy.stream(["a red boat"], **SMALL) for _ in range(2)]
    for stream in streams:
        next(stream)
        latents, step = stream.driver._unwritten
        sizes.append(_size(latents, step))
        assert sizes[-1] == _size(torch.zeros_like(latents), step)
    assert sizes[0] != sizes[1]
    assert streams[0].memory.pool.key.data_ptr() != streams[1].memory.pool.key.data_ptr()

"""What a captured pass is known by: all that it fixes, on any machine."""

import torch

from memflow import MemoryConfig
from memflow.memory.places import Unplaced
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


def test_a_graph_is_not_replayed_for_other_keys_at_place_zero(toy):
    """With relative positions a clean pass writes beside the pool, too: where it did when it was captured."""
    stream = toy.stream(["a red boat"], memory=MemoryConfig(top_k=2, positions="relative"), **SMALL)
    next(stream)
    latents, step = stream.driver._unwritten
    elsewhere = tuple(Unplaced(of.key.clone(), of.frame_mean.clone()) for of in step.unplaced)
    sizes = [_size(latents, step._replace(unplaced=unplaced)) for unplaced in (step.unplaced, elsewhere, ())]
    assert len(set(sizes)) == 3
    assert sizes[0] == _size(latents.clone(), step)

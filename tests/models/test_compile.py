"""`MemFlowPipeline.compile`: one graph for all layers, and none made anew while a stream goes on."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from memflow.memory import MemoryConfig
from memflow_bench.untrained import noise_pipeline

STORY = ["a red boat", "an owl", "a lighthouse", "the sea"]


def latents(pipeline, memory: MemoryConfig, graphs=None) -> torch.Tensor:
    """Twenty chunks, a prompt switch after every fifth."""
    stream = pipeline.stream(STORY, seconds_per_prompt=3.75, height=32, width=32, memory=memory)
    made = []
    for chunk in stream:
        made.append(chunk.latents)
        if graphs is not None:
            graphs.append(counters["stats"]["unique_graphs"])
    return torch.cat(made, dim=2)


@pytest.mark.parametrize(
    ("positions", "settled", "most"),
    # With relative positions clean passes have graphs of their own. The first in which heads choose is that over the
    # second chunk, and it is made when the third is asked for.
    [("absolute", 1, 3), pytest.param("relative", 2, 8, marks=pytest.mark.slow)],
)
def test_compiled_blocks(toy, positions, settled, most):
    memory = MemoryConfig(top_k=2, positions=positions)
    compiled, graphs = noise_pipeline(), []
    torch._dynamo.reset()
    counters.clear()
    compiled.compile(backend="aot_eager")
    try:
        torch.testing.assert_close(latents(compiled, memory, graphs), latents(toy, memory), rtol=0, atol=1e-5)
    finally:
        torch._dynamo.reset()
    assert len(graphs) == 20
    assert graphs[settled:5] == [graphs[settled]] * (5 - settled), "a memory that grows compiles nothing"
    assert graphs[5:] == [graphs[5]] * 15, "nothing after the first prompt switch, which has another size"
    assert graphs[-1] <= most, "layers share their graphs"

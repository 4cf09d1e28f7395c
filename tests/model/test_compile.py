"""Compiled blocks, as diffusers offers them: one graph for all layers, none anew once the memory is full."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from memflow.config import MemoryConfig
from memflow.pipeline import MemFlowPipeline


def latents(pipeline, memory: MemoryConfig, graphs=None) -> torch.Tensor:
    stream = pipeline.stream(["a red boat", "an owl"], seconds_per_prompt=4.5, height=32, width=32, memory=memory)
    made = []
    for chunk in stream:
        made.append(chunk.latents)
        if graphs is not None:
            graphs.append(counters["stats"]["unique_graphs"])
    return torch.cat(made, dim=2)


@pytest.mark.parametrize(
    ("positions", "most"),
    [("absolute", 4), pytest.param("relative", 8, marks=pytest.mark.slow)],  # clean passes have graphs of their own
)
def test_compiled_blocks(toy, positions, most):
    memory = MemoryConfig(top_k=2, positions=positions)
    compiled, graphs = MemFlowPipeline.from_preset("toy"), []
    torch._dynamo.reset()
    counters.clear()
    compiled.transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    try:
        torch.testing.assert_close(latents(compiled, memory, graphs), latents(toy, memory), rtol=0, atol=1e-5)
    finally:
        torch._dynamo.reset()
    assert len(graphs) == 12
    assert graphs[7:] == [graphs[7]] * 5, "a full memory, a prompt switch among them, compiles nothing"
    assert graphs[-1] <= most, "layers share their graphs; sizes that grow with the memory are dynamic"

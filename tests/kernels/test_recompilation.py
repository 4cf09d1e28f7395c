"""An attention layer of a stream under torch.compile: one graph, compiled once, for every chunk."""

import shutil

import pytest
import torch
from torch import nn

from memflow_kernels import Pool, memory_attention, prompt_relevance, qk_norm_rope_write, replace_frame
from memflow_kernels.testing import assert_close, draw, states

HEADS, HEAD_DIM, GRID = 2, 8, (2, 3)
TOKENS, CHANNELS = GRID[0] * GRID[1], HEADS * HEAD_DIM
CANDIDATES, RING = 3, 9  # slots: the candidates, then the ring of the window


class Layer(nn.Module):
    """What the attention processor of a video model does with the ops, and the update of the bank before a chunk."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Parameter(draw(torch.randn, CHANNELS, 3 * CHANNELS, seed=0) / CHANNELS**0.5)
        self.weight = nn.Parameter(1 + draw(torch.randn, CHANNELS, seed=1) / 4)

    def forward(self, hidden, text, start, slots, pool):
        score = prompt_relevance(text, frame_mean=pool.frame_mean[:, :CANDIDATES])
        replace_frame(pool, score.argmin(1).int(), slots[:1])
        query, key, value = (x.unflatten(2, (HEADS, -1)) for x in (hidden @ self.qkv).chunk(3, -1))
        weights = {"weight_q": self.weight, "weight_k": self.weight, "eps": 1e-6}
        query = qk_norm_rope_write(query, key, value, grid=GRID, start_frame=start, pool=pool, slots=slots, **weights)
        options = {"tokens_per_frame": TOKENS, "candidate_frames": CANDIDATES, "top_k": 2}
        out = memory_attention(query, pool.key, pool.value, frame_mean=pool.frame_mean[:, :CANDIDATES], **options)
        return hidden + out.flatten(2)


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_one_graph_serves_twenty_chunks(compiler):
    """Neither the number of the chunk nor the slots it takes are part of the graph."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if compiler == "inductor" and device == "cpu" and not shutil.which("g++"):
        pytest.skip("inductor needs g++ on the CPU")
    torch._dynamo.reset()
    layer = Layer().to(device)
    compiled = torch.compile(layer, fullgraph=True, backend=compiler)
    pools = [Pool.zeros(1, CANDIDATES + RING, TOKENS, HEADS, HEAD_DIM, device=device) for _ in range(2)]
    torch._dynamo.utils.counters.clear()
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for chunk in range(20):
            hidden = states(1, 3 * TOKENS, HEADS, HEAD_DIM, device=device, seed=chunk).flatten(2)
            text = states(1, 5, HEADS, HEAD_DIM, device=device, seed=chunk)
            place = [CANDIDATES + (3 * chunk + frame) % RING for frame in range(3)]
            start, slots = torch.tensor([3 * chunk]), torch.tensor(place, dtype=torch.int32)
            arguments = (hidden, text, start.to(device), slots.to(device))
            assert_close(compiled(*arguments, pools[1]), layer(*arguments, pools[0]))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    for actual, expected in zip(pools[1], pools[0], strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("top_k", [None, 1])
def test_one_graph_serves_every_number_of_queries(top_k):
    """The number of queries meets no condition but those of the result: none of the sentence for an error."""
    query, key = states(2, 5, HEADS, HEAD_DIM), states(2, 4 * TOKENS, HEADS, HEAD_DIM)

    class Attention(nn.Module):
        def forward(self, query, key):
            return memory_attention(query, key, key, tokens_per_frame=TOKENS, candidate_frames=3, top_k=top_k)

    queries = torch.export.Dim("queries", min=2, max=5 * TOKENS)
    exported = torch.export.export(Attention(), (query, key), dynamic_shapes=({1: queries}, None)).module()
    for count in (2, TOKENS, 4 * TOKENS):  # the last: as many as keys
        query = states(2, count, HEADS, HEAD_DIM, seed=count)
        assert_close(exported(query, key), Attention()(query, key))

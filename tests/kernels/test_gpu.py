"""What only a GPU can show: the default backend, CUDA graphs replayed with new inputs, addresses past 2^31."""

import pytest
import torch

from memflow_kernels import (
    Pool,
    available_backends,
    cover_frames,
    frame_means,
    memory_attention,
    merge_attention,
    prompt_relevance,
    qk_norm_rope,
    qk_norm_rope_write,
    replace_frame,
    select_frames,
    use_backend,
)
from memflow_kernels.backends import current_backend
from memflow_kernels.cuda import extension
from memflow_kernels.ops.relevance import AGGREGATES
from memflow_kernels.testing import states

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU: CUDA graphs and large pools need one"),
]
TOKENS, GRID = 24, (4, 6)
PLACE = {"eps": 1e-6, "grid": GRID}


class Inputs:
    """What changes from chunk to chunk, at addresses that stay."""

    def __init__(self, seed: int, dtype: torch.dtype):
        make = lambda tokens, salt: states(  # noqa: E731
            1, tokens, 3, 64, dtype=dtype, device="cuda", seed=10 * seed + salt
        )
        self.query, self.key, self.value = (make(2 * TOKENS, salt) for salt in (0, 1, 2))
        self.text = make(5, 3)
        self.weight = make(1, 4).flatten()
        self.start = torch.tensor(100 * seed, device="cuda")
        self.slots = torch.tensor([(4, 5), (5, 3)][seed], dtype=torch.int32, device="cuda")
        self.slot = torch.tensor([seed], dtype=torch.int32, device="cuda")
        self.pool = Pool(make(6 * TOKENS, 5), make(6 * TOKENS, 6), frame_means(make(6 * TOKENS, 5), TOKENS))

    def copy_(self, other: "Inputs") -> None:
        for mine, others in zip(self.tensors(), other.tensors(), strict=True):
            mine.copy_(others)

    def tensors(self) -> list[torch.Tensor]:
        return [self.query, self.key, self.value, self.text, self.weight, self.start, self.slots, self.slot, *self.pool]


def chunk(x: Inputs) -> list[torch.Tensor]:
    """Every op once, forward and backward, as a chunk of a stream would call them."""
    weights = {"weight_q": x.weight, "weight_k": x.weight}
    query = qk_norm_rope_write(
        x.query, x.key, x.value, start_frame=x.start, pool=x.pool, slots=x.slots, **weights, **PLACE
    )
    replace_frame(x.pool, x.slot, x.slot + 1)
    options = {"tokens_per_frame": TOKENS}
    table = select_frames(query, x.pool.frame_mean[:, :4], 2)
    leaves = [part.detach().requires_grad_() for part in (query, x.pool.key, x.pool.value)]
    out, lse = memory_attention(*leaves, candidate_frames=4, top_k=2, return_lse=True, **options)
    dense = memory_attention(query, *x.pool[:2], return_lse=True, **options)
    results = [query, table, out, lse, *merge_attention(out, lse, *dense), *x.pool, frame_means(x.key, TOKENS)]
    relevance = [prompt_relevance(x.text, x.pool.key, aggregate=name, **options) for name in AGGREGATES]
    counts = x.text.float().abs().sum((2, 3))
    results += [*relevance, cover_frames(relevance[-1], counts, 3, relevance[0])]
    results += torch.autograd.grad(out.float().square().sum(), leaves)
    rotated = [part.detach().requires_grad_() for part in (x.query, x.key)]
    new = qk_norm_rope(*rotated, start_frame=x.start, **weights, **PLACE)
    return [*results, *new, *torch.autograd.grad(sum(part.float().square().sum() for part in new), rotated)]


@pytest.fixture(params=["triton", "cuda"])
def on_gpu(request):
    """The test runs on every backend that a GPU has."""
    reason = available_backends()[request.param]
    if reason is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    if request.param == "cuda":
        assert extension.unloadable() is None
    with use_backend(request.param):
        yield


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_captured_chunk_follows_its_inputs(dtype):
    """One graph, captured once, gives what the ops give when called with other inputs, start frames and slots."""
    inputs = Inputs(0, dtype)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        chunk(inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chunk(inputs)
    for seed in (1, 0):
        expected = [x.clone() for x in chunk(Inputs(seed, dtype))]
        inputs.copy_(Inputs(seed, dtype))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def test_triton_is_the_default():
    assert current_backend(torch.device("cuda", 0)) == "triton"


@pytest.mark.usefixtures("on_gpu")
def test_addresses_past_two_to_the_31():
    """The last frames of a pool of 2.4 billion numbers: written, averaged, copied, attended to."""
    slots, tokens, heads, head_dim = 1000, 1560, 12, 128
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("less than 16 GiB of free GPU memory")
    pool = Pool.zeros(1, slots, tokens, heads, head_dim, dtype=torch.bfloat16, device="cuda")
    query, key, value = (
        states(1, tokens, heads, head_dim, dtype=torch.bfloat16, device="cuda", seed=seed) for seed in range(3)
    )
    weight = torch.ones(heads * head_dim, dtype=torch.bfloat16, device="cuda")
    place = {"weight_q": weight, "weight_k": weight, "eps": 1e-6, "grid": (30, 52), "start_frame": 0}
    last = torch.tensor([slots - 1], dtype=torch.int32, device="cuda")
    qk_norm_rope_write(query, key, value, pool=pool, slots=last, **place)
    replace_frame(pool, last - 1, last)
    expected = qk_norm_rope(query, key, **place)[1]
    assert torch.equal(pool.key[:, -tokens:], expected)
    assert torch.equal(pool.value[:, -2 * tokens : -tokens], value)
    means = frame_means(pool.key, tokens)
    torch.testing.assert_close(means[:, -2], expected.float().mean(1))
    assert not means[:, :-2].any()
    table = last.expand(1, heads, 1)
    options = {"tokens_per_frame": tokens, "candidate_frames": slots, "frame_table": table}
    far = memory_attention(query[:, :32], pool.key, pool.value, **options)
    near = memory_attention(query[:, :32], expected, value, tokens_per_frame=tokens)
    torch.testing.assert_close(far, near, atol=0.01, rtol=0.02)

"""memory_attention under autograd, opcheck and torch.compile."""

import pytest
import torch

from memflow_kernels import memory_attention
from memflow_kernels.testing import ATTENTION_CASES, assert_close, attention_inputs, states

BACKENDS = pytest.mark.usefixtures("backend")


def gradient_inputs():
    return [states(2, n, 2, 3, dtype=torch.float64, seed=n + s).requires_grad_() for s, n in enumerate((4, 12, 12))]


TABLE = torch.tensor([[[0, 0], [-1, 2]], [[1, -1], [-1, -1]]], dtype=torch.int32)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"candidate_frames": 3, "top_k": 2},
        {"candidate_frames": 4, "top_k": 1},
        {"candidate_frames": 3, "frame_table": TABLE},
        {"candidate_frames": 3, "top_k": 1, "query_block": 3},
    ],
    ids=["dense", "activated", "no_window", "table", "blocks"],
)
def test_gradient(options):
    """Through the output and through the log-sum-exp."""

    def attend(query, key, value):
        return memory_attention(query, key, value, tokens_per_frame=3, return_lse=True, **options)

    assert torch.autograd.gradcheck(attend, gradient_inputs())


def test_gradient_where_a_head_has_no_key():
    leaves = gradient_inputs()

    def attend(query, key, value):
        options = {"tokens_per_frame": 3, "candidate_frames": 4, "frame_table": TABLE}
        out, lse = memory_attention(query, key, value, return_lse=True, **options)
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    assert torch.autograd.gradcheck(attend, leaves)


@BACKENDS
def test_gradient_survives_frames_far_above_the_chosen_ones():
    """The logits of a frame that was not chosen may exceed the log-sum-exp by any amount."""
    query, key, value = (x.detach().float() for x in gradient_inputs())
    key[:, :3] = 1e4 * query.sum(1, keepdim=True)
    leaves = [x.requires_grad_() for x in (query, key, value)]
    table = torch.full((2, 2, 1), 1, dtype=torch.int32)
    out = memory_attention(*leaves, tokens_per_frame=3, candidate_frames=2, frame_table=table)
    grads = torch.autograd.grad(out.sum(), leaves)
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert torch.equal(grads[1][:, :3], torch.zeros(2, 3, 2, 3))


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradient_in_low_precision(dtype):
    inputs = attention_inputs(ATTENTION_CASES[1], dtype=dtype, layout="heads_first")
    table = torch.tensor([[[0, 2, 5], [1, 1, -1], [-1, -1, -1], [3, 4, 5]]], dtype=torch.int32)
    grads = []
    for scaled in (inputs, tuple(x.double() for x in inputs)):
        leaves = [x.detach().requires_grad_() for x in scaled]
        out = memory_attention(*leaves, tokens_per_frame=12, candidate_frames=6, frame_table=table)
        upstream = states(1, 36, 4, 32, seed=9).to(dtype)
        grads.append(torch.autograd.grad(out, leaves, upstream.to(out.dtype)))
    for actual, expected in zip(*grads, strict=True):
        assert actual.dtype == dtype
        assert_close(actual, expected, roundings=2)


@BACKENDS
@pytest.mark.parametrize("table", [None, TABLE], ids=["dense", "table"])
def test_opcheck(table):
    table = None if table is None else table.to(torch.get_default_device())
    states_ = [x.detach().float().requires_grad_() for x in gradient_inputs()]
    sizes = (table, 3, 3, 0.5, None)
    torch.library.opcheck(torch.ops.memflow.memory_attention, (*states_, *sizes))
    for query_block in (None, 2):
        top_k = (*states_, None, None, 3, 2, 1, 0.5, query_block)
        torch.library.opcheck(torch.ops.memflow.memory_attention_top_k, top_k)
    query, key, value = (x.detach() for x in states_)
    out, lse = torch.ops.memflow.memory_attention(query, key, value, *sizes)
    arguments = (torch.ones_like(out), torch.ones_like(lse), query, key, value, out, lse, *sizes)
    torch.library.opcheck(torch.ops.memflow.memory_attention_backward, arguments, test_utils="test_faketensor")


def attend_compiled(query, key, value):
    return memory_attention(query * 2, key, value, tokens_per_frame=3, candidate_frames=3, top_k=2) + 1


def test_compiles_to_one_graph_with_inductor():
    inputs = [x.detach().float() for x in gradient_inputs()]
    compiled = torch.compile(attend_compiled, fullgraph=True, backend="inductor")
    torch.testing.assert_close(compiled(*inputs), attend_compiled(*inputs))


@BACKENDS
def test_compiles_to_one_graph_with_gradients():
    leaves = [x.detach().float().requires_grad_() for x in gradient_inputs()]
    eager = attend_compiled(*leaves)
    compiled = torch.compile(attend_compiled, fullgraph=True, backend="aot_eager")(*leaves)
    assert torch.equal(compiled, eager)
    expected = torch.autograd.grad(eager.square().sum(), leaves)
    actual = torch.autograd.grad(compiled.square().sum(), leaves)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)

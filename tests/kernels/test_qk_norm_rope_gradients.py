"""qk_norm_rope under autograd, opcheck and torch.compile."""

import pytest
import torch

from memflow_kernels import Pool, qk_norm_rope, qk_norm_rope_write
from memflow_kernels.testing import LAYOUTS, assert_close, poisoned_memory, states

BACKENDS = pytest.mark.usefixtures("backend")


ROUNDINGS = 3  # norm, weight, rotation


def slot_tensor(*slots):
    return torch.tensor(slots, dtype=torch.int32)


def gradient_inputs(dtype=torch.float64):
    query, key = (states(2, 4, 2, 4, dtype=dtype, seed=seed).requires_grad_() for seed in (0, 1))
    weight_q, weight_k = (states(1, 1, 1, 8, dtype=dtype, seed=seed)[0, 0, 0].requires_grad_() for seed in (2, 3))
    return query, key, weight_q, weight_k


def normed(query, key, weight_q, weight_k, start_frame=7):
    return qk_norm_rope(
        query, key, weight_q=weight_q, weight_k=weight_k, eps=1e-6, grid=(1, 2), start_frame=start_frame
    )


def test_gradient():
    assert torch.autograd.gradcheck(normed, gradient_inputs())


@BACKENDS
def test_gradient_of_one_output():
    query, key, weight_q, weight_k = gradient_inputs()
    normed(query, key, weight_q, weight_k)[0].square().sum().backward()
    assert query.grad.abs().sum() > 0
    assert key.grad is None or not key.grad.any()


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gradients_have_the_dtypes_of_the_inputs(dtype):
    leaves = gradient_inputs(dtype)
    query, key = normed(*leaves)
    with poisoned_memory():
        grads = torch.autograd.grad(query.sum() + key.sum(), leaves)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    query, key = normed(*wide)
    for grad, expected in zip(grads, torch.autograd.grad(query.sum() + key.sum(), wide), strict=True):
        assert grad.dtype == dtype
        assert_close(grad, expected, roundings=ROUNDINGS)


@BACKENDS
def test_opcheck():
    place = (1e-6, 1, 2, 0, torch.tensor(3))
    arguments = gradient_inputs(torch.float32)
    torch.library.opcheck(torch.ops.memflow.qk_norm_rope, (*arguments, *place))
    query, key, weight_q, weight_k = (x.detach() for x in arguments)
    states_ = (query, key, key.clone(), weight_q, weight_k)
    pool = Pool.zeros(2, 5, 2, 2, 4)
    torch.library.opcheck(torch.ops.memflow.qk_norm_rope_write, (*states_, *place, *pool, slot_tensor(4, -1), True))
    backward = (query, key, query.clone(), key.clone(), weight_q, weight_k, *place)
    torch.library.opcheck(torch.ops.memflow.qk_norm_rope_backward, backward, test_utils="test_faketensor")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fakes_have_the_strides_of_the_results(layout):
    x = states(1, 6, 3, 8, layout=layout)
    weight, place = torch.ones(24), (1e-6, 1, 2, 0, torch.tensor(3))
    pool = Pool.zeros(1, 5, 2, 3, 8)
    torch.library.opcheck(torch.ops.memflow.qk_norm_rope, (x, x.clone(), weight, weight, *place))
    arguments = (x, x.clone(), x.clone(), weight, weight, *place, *pool, slot_tensor(4, -1, 0))
    for query_mean in (False, True):
        torch.library.opcheck(torch.ops.memflow.qk_norm_rope_write, (*arguments, query_mean))


@BACKENDS
def test_compiles_to_one_graph_for_every_start_and_slot():
    query, key, weight_q, weight_k = (x.detach() for x in gradient_inputs(torch.float32))

    def write(start, slots, pool):
        options = {"weight_q": weight_q, "weight_k": weight_k, "eps": 1e-6, "grid": (1, 2)}
        written = qk_norm_rope_write(query, key, key * 2, start_frame=start, pool=pool, slots=slots, **options)
        return written, pool.key + 1

    compiled = torch.compile(write, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for start, slots in ((0, (0, 1)), (3, (4, -1)), (5000, (-1, 2))):
            pools = [Pool.zeros(2, 5, 2, 2, 4) for _ in range(2)]
            expected = write(torch.tensor(start), slot_tensor(*slots), pools[0])
            actual = compiled(torch.tensor(start), slot_tensor(*slots), pools[1])
            pairs = zip((*actual, *pools[1]), (*expected, *pools[0]), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)


@BACKENDS
def test_gradients_compile():
    leaves = gradient_inputs(torch.float32)
    compiled = torch.compile(normed, fullgraph=True, backend="aot_eager")
    results = [torch.autograd.grad(sum(x.square().sum() for x in run(*leaves)), leaves) for run in (normed, compiled)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

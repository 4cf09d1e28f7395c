import loops
import pytest
import torch
from hypothesis import given, settings
from strategies import cases

from memflow_kernels import frame_means
from memflow_kernels.testing import assert_close, poisoned_memory, states

KERNELS = settings.get_profile("kernels")
BACKENDS = pytest.mark.usefixtures("backend")


@BACKENDS
@KERNELS
@given(cases())
def test_equals_the_loop(case):
    key = case.key()
    with poisoned_memory():
        actual = frame_means(key, case.tokens_per_frame)
    assert actual.dtype == (torch.float64 if case.dtype == torch.float64 else torch.float32)
    assert_close(actual, torch.from_numpy(loops.frame_means(key, case.tokens_per_frame)))


@BACKENDS
def test_no_frames():
    assert frame_means(torch.zeros(2, 0, 3, 4), 5).shape == (2, 0, 3, 4)


@BACKENDS
def test_long_frames_keep_float32_accuracy():
    key = states(1, 2 * 1560, 1, 4, mean=1.0)
    assert_close(frame_means(key, 1560), frame_means(key.double(), 1560))


def test_gradient():
    key = states(2, 6, 2, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: frame_means(x, 3), key)


@BACKENDS
def test_gradient_has_the_dtype_of_the_key():
    key = states(1, 4, 1, 2, dtype=torch.bfloat16).requires_grad_()
    frame_means(key, 2).sum().backward()
    assert key.grad.dtype == torch.bfloat16
    assert torch.equal(key.grad, torch.full_like(key, 0.5))


@BACKENDS
def test_opcheck():
    torch.library.opcheck(torch.ops.memflow.frame_means, (states(2, 6, 2, 3).requires_grad_(), 3))


@BACKENDS
def test_compiles_to_one_graph():
    key = states(2, 6, 2, 3)
    compiled = torch.compile(lambda x: frame_means(x, 3) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(key), frame_means(key, 3) * 2)


@pytest.mark.parametrize(
    ("key", "tokens_per_frame", "error", "message"),
    [
        ([1.0], 2, TypeError, "key must be a torch.Tensor, got list"),
        (torch.zeros(6, 2, 3), 2, ValueError, r"key must be \[B, F\*N, H, D\], 4 dimensions, got shape \[6, 2, 3\]"),
        (torch.zeros(1, 6, 2, 3, dtype=torch.int32), 2, TypeError, "key must be float32.*got torch.int32"),
        (torch.zeros(1, 6, 0, 3), 2, ValueError, r"sizes of at least 1, got shape \[1, 6, 0, 3\]"),
        (torch.zeros(1, 6, 2, 257), 2, ValueError, "head size D = 257; at most 256"),
        (torch.zeros(1, 6, 3, 2).transpose(2, 3), 2, ValueError, "dense last dimension"),
        (torch.zeros(1, 6, 2, 3), 4, ValueError, "key has 6 tokens, not a multiple of tokens_per_frame = 4"),
        (torch.zeros(1, 6, 2, 3), 0, ValueError, "tokens_per_frame must be at least 1, got 0"),
        (torch.zeros(1, 6, 2, 3), 2.0, TypeError, "tokens_per_frame must be an int, got float"),
    ],
)
def test_bad_input(key, tokens_per_frame, error, message):
    with pytest.raises(error, match=message):
        frame_means(key, tokens_per_frame)

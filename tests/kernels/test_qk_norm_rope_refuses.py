"""What qk_norm_rope and qk_norm_rope_write refuse, by the name of the argument."""

import pytest
import torch

from memflow_kernels import Pool, qk_norm_rope, qk_norm_rope_write


def slot_tensor(*slots):
    return torch.tensor(slots, dtype=torch.int32)


X, W = torch.zeros(2, 8, 2, 4), torch.zeros(8)
GOOD = {"weight_q": W, "weight_k": W, "eps": 1e-6, "grid": (2, 2), "start_frame": 0}


@pytest.mark.parametrize(
    ("states_", "options", "error", "message"),
    [
        ((X, X[:, :4]), {}, ValueError, r"key must be .* like query = \[2, 8, 2, 4\], got \[2, 4, 2, 4\]"),
        ((X, X.half()), {}, TypeError, "key must have the dtype of query"),
        ((X[..., :3], X[..., :3]), {"weight_q": W[:6], "weight_k": W[:6]}, ValueError, "needs an even one"),
        ((X, X), {"weight_q": W[:4]}, ValueError, r"weight_q must be \[H\*D\] = \[8\], got \[4\]"),
        ((X, X), {"weight_k": W.int()}, TypeError, "weight_k must be float32.*got torch.int32"),
        ((X, X), {"weight_k": None}, TypeError, "weight_k must be a torch.Tensor, got NoneType"),
        ((X, X), {"eps": -1.0}, ValueError, "eps must be at least 0, got -1.0"),
        ((X, X), {"eps": float("nan")}, ValueError, "eps must be at least 0, got nan"),
        ((X, X), {"grid": (3, 1)}, ValueError, r"query has 8 tokens, not a multiple of rows \* cols = 3 \* 1"),
        ((X, X), {"grid": (0, 4)}, ValueError, "grid rows must be at least 1, got 0"),
        ((X, X), {"grid": 4}, TypeError, r"grid must be \(rows, cols\), got 4"),
        ((X, X), {"start_frame": -1}, ValueError, "start_frame must be at least 0, got -1"),
        ((X, X), {"start_frame": 0.5}, TypeError, "start_frame must be an int, got float"),
        ((X, X), {"start_frame": torch.tensor(0.5)}, TypeError, "start_frame must be int32 or int64"),
        ((X, X), {"start_frame": torch.tensor([1, 2])}, ValueError, r"start_frame must hold one number.*\[2\]"),
    ],
)
def test_bad_input(states_, options, error, message):
    with pytest.raises(error, match=message):
        qk_norm_rope(*states_, **{**GOOD, **options})


POOL = Pool.zeros(2, 5, 4, 2, 4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"value": X[:, :4]}, ValueError, "value must be .* like query"),
        ({"pool": tuple(POOL)}, TypeError, "pool must be a memflow_kernels.Pool, got tuple"),
        (
            {"pool": Pool.zeros(1, 5, 4, 2, 4)},
            ValueError,
            r"pool.key must be .* = \[2, 20, 2, 4\], got \[1, 20, 2, 4\]",
        ),
        ({"pool": Pool.zeros(2, 5, 3, 2, 4)}, ValueError, "pool has 3 tokens per slot; grid 2 x 2 needs 4"),
        ({"pool": Pool.zeros(2, 5, 4, 2, 4, dtype=torch.float16)}, TypeError, "pool.key must have the dtype of query"),
        ({"pool": POOL._replace(value=X)}, ValueError, "pool.value must be .* like pool.key"),
        ({"pool": POOL._replace(frame_mean=X.half())}, TypeError, "pool.frame_mean must be torch.float32"),
        ({"pool": POOL._replace(frame_mean=torch.zeros(2, 3, 2, 4))}, ValueError, "not a multiple of the 3 slots"),
        ({"slots": slot_tensor(0)}, ValueError, r"slots must be \[n\], one slot per frame = \[2\], got \[1\]"),
        ({"slots": slot_tensor(0, 1).long()}, TypeError, "slots must be int32, got torch.int64"),
        ({"slots": [0, 1]}, TypeError, "slots must be a torch.Tensor, got list"),
        ({"slots": slot_tensor(0, 5)}, ValueError, r"slots is \[0, 5\]: each must be -1 .* 0 to 4"),
        ({"slots": slot_tensor(-2, 0)}, ValueError, r"slots is \[-2, 0\]"),
        ({"slots": slot_tensor(3, 3)}, ValueError, "two frames cannot take the same slot"),
        ({"query_mean": 1}, TypeError, "query_mean must be True or False, got 1"),
    ],
)
def test_bad_write(options, error, message):
    options = {"value": X, "pool": POOL, "slots": slot_tensor(0, 1), **GOOD, **options}
    with pytest.raises(error, match=message):
        qk_norm_rope_write(X, X, options.pop("value"), **options)


def test_write_refuses_gradients():
    options = {"pool": Pool.zeros(2, 5, 4, 2, 4), "slots": slot_tensor(0, 1), **GOOD}
    options["weight_q"] = W.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="use qk_norm_rope, which is differentiable"):
        qk_norm_rope_write(X, X, X, **options)
    with torch.no_grad():
        qk_norm_rope_write(X, X, X, **options)

"""memory_attention as people call it by mistake, or with numbers and devices that other libraries hand out."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from memflow_kernels import memory_attention
from memflow_kernels.testing import states

N = 7


def inputs(layout, heads=4, key_heads=2):
    query, key, value = (states(2, n * N, h, 16, seed=n) for n, h in ((3, heads), (9, key_heads), (9, key_heads)))
    return [x.transpose(1, 2) if layout == "bhld" else x for x in (query, key, value)]


@pytest.mark.parametrize("layout", ["blhd", "bhld"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("place", "name"), [(0, "query"), (1, "key"), (2, "value")])
def test_what_is_no_tensor_is_named(layout, autocast, place, name):
    arguments = inputs(layout)
    for wrong in (None, np.zeros(3)):
        arguments[place] = wrong
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
            pytest.raises(TypeError, match=f"{name} must be a torch.Tensor, got {type(wrong).__name__}"),
        ):
            memory_attention(*arguments, tokens_per_frame=N, layout=layout)


@pytest.mark.parametrize("scale", [np.float32(0.25), np.float16(0.25), Fraction(1, 4), np.int64(1), 1])
def test_any_real_number_is_a_scale(scale):
    arguments = inputs("blhd")
    out = memory_attention(*arguments, tokens_per_frame=N, scale=scale)
    assert torch.equal(out, memory_attention(*arguments, tokens_per_frame=N, scale=float(scale)))


@pytest.mark.parametrize("wrong", [False, "", 0.0])
def test_an_empty_value_is_not_zero_candidates(wrong):
    with pytest.raises(TypeError, match="candidate_frames must be an int, got"):
        memory_attention(*inputs("blhd"), tokens_per_frame=N, candidate_frames=wrong)


def test_the_layout_is_suggested_for_fewer_key_heads_too():
    with pytest.raises(ValueError, match=r"not a multiple of .* say layout='bhld'"):
        memory_attention(*inputs("bhld"), tokens_per_frame=N)


def test_shapes_can_be_had_on_the_meta_device():
    query, key, value = (x.to("meta") for x in inputs("blhd"))
    out, lse = memory_attention(query, key, value, tokens_per_frame=N, candidate_frames=4, top_k=2, return_lse=True)
    assert (out.shape, out.device.type, list(lse.shape)) == (query.shape, "meta", [2, 4, 3 * N])


@pytest.mark.parametrize("keys", [1, 7, 15, 16, 17])
def test_nan_that_is_attended_to_is_not_hidden(keys):
    """Torch's fused kernel gives 0, and a log-sum-exp of 0, where all of fewer keys than a register holds are NaN."""
    query, key, value = (states(1, n, 2, 16, seed=n) for n in (5, keys, keys))
    for poisoned in ((query, key * torch.nan, value), (query * torch.nan, key, value)):
        out, lse = memory_attention(*poisoned, tokens_per_frame=keys, return_lse=True)
        assert out.isnan().all() and lse.isnan().all()


def test_a_chosen_frame_of_nan_is_not_hidden():
    query, key, value = (states(1, n * N, 2, 16, seed=n) for n in (3, 9, 9))
    key[:, :N] = torch.nan  # counts as the best candidate; in the middle of the others, a part of its own
    out, lse = memory_attention(
        query, key, value, tokens_per_frame=N, candidate_frames=4, return_lse=True,
        frame_table=torch.tensor([0, 2], dtype=torch.int32).expand(1, 2, 2),
    )  # fmt: skip
    assert out.isnan().all() and lse.isnan().all()

"""Places outside a tensor are no addresses to the Triton kernels: what lies beside it stays as it was."""

import pytest
import torch

from memflow_kernels.backends import available_backends, implementation, interpreting
from memflow_kernels.testing import states

if available_backends()["triton"] is not None:
    pytest.skip(f"backend triton: {available_backends()['triton']}", allow_module_level=True)

from memflow_kernels.triton.gather import gather_frames
from memflow_kernels.triton.means import write_means


@pytest.fixture(autouse=True)
def _device():
    torch.set_default_device(None if interpreting() else "cuda")
    yield
    torch.set_default_device(None)


@pytest.mark.parametrize("outside", [-1, 3, 4], ids=str)
def test_means_of_a_place_outside_are_not_written(outside):
    x = states(1, 2 * 7, 2, 24)
    around = torch.full((1, 6, 2, 24), 5.0)
    write_means(x, around[:, 1:4], 7, slots=torch.tensor([outside, 1], dtype=torch.int32))
    torch.testing.assert_close(around[:, 2], x[:, 7:].mean(1))
    assert (around[:, [0, 1, 3, 4, 5]] == 5).all()


@pytest.mark.parametrize(("slot", "source"), [(3, 0), (0, 3), (4, 1), (-1, 1), (1, -1), (-2, 0)])
def test_a_frame_is_neither_taken_from_outside_nor_put_there(slot, source):
    """A pool of 3 slots inside a longer buffer."""
    whole = [*(states(2, 5 * 7, 2, 24, seed=s) for s in (0, 1)), states(2, 5, 2, 24, seed=2)]
    before = [x.clone() for x in whole]
    pool = (whole[0][:, 7:28], whole[1][:, 7:28], whole[2][:, 1:4])
    numbers = (torch.tensor([n, -1], dtype=torch.int32) for n in (slot, source))
    implementation("replace_frame", "triton")(*pool, *numbers)
    assert all(torch.equal(a, b) for a, b in zip(whole, before, strict=True))


@pytest.mark.parametrize("beyond", [2, 3, 2**30], ids=str)
def test_frames_behind_the_candidates_are_not_gathered(beyond):
    key, value = (states(1, 4 * 7, 2, 16, seed=s) for s in (0, 1))
    wild = torch.tensor([[[beyond, 1], [0, beyond]]], dtype=torch.int32)
    tame = torch.tensor([[[-1, 1], [0, -1]]], dtype=torch.int32)
    for a, b in zip(gather_frames(key, value, wild, 7, 2), gather_frames(key, value, tame, 7, 2), strict=True):
        assert torch.equal(a, b)

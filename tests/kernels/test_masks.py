"""block_causal_table: the masks of causal training, against the same masks per token in torch's own attention."""

import doctest

import pytest
import torch
import torch.nn.functional as F

from memflow_kernels import block_causal_table, masks, memory_attention
from memflow_kernels.testing import assert_close, poisoned_memory, states

N = 6  # tokens per frame
MASKS = {  # name: (frames of the sequence, arguments)
    "self forcing": (6, {"frames": 6, "frames_per_block": 3}),
    "causvid, one frame at a time": (5, {"frames": 5, "frames_per_block": 1}),
    "local": (6, {"frames": 6, "frames_per_block": 2, "local": 4}),
    "longlive, local and sink": (8, {"frames": 8, "frames_per_block": 2, "local": 4, "sink": 2}),
    "image to video": (8, {"frames": 8, "frames_per_block": 3, "first_block": 1}),
    "a short last block": (7, {"frames": 7, "frames_per_block": 3, "local": 4, "sink": 1}),
    "teacher forcing": (8, {"frames": 4, "frames_per_block": 2, "teacher_forcing": True}),
    "teacher forcing, local and sink": (
        8,
        {"frames": 4, "frames_per_block": 1, "local": 2, "sink": 1, "teacher_forcing": True},
    ),
}


def visible(frames, frames_per_block, local=None, sink=0, first_block=None, teacher_forcing=False):
    """[L, L] bool per token, by the rule for one query and one key at a time."""
    first = first_block or frames_per_block

    def block(frame):
        return 0 if frame < first else 1 + (frame - first) // frames_per_block

    def end(frame):
        return min(first + block(frame) * frames_per_block, frames)

    def remembered(query, key):
        """The clean frame `key`, seen from the block of frame `query`, its own block not included."""
        near = local is None or key >= end(query) - local
        return block(key) < block(query) and (near or key < sink)

    def sees(query, key):
        query_noisy, query = divmod(query, frames)
        key_noisy, key = divmod(key, frames)
        same_block = block(query) == block(key)
        if query_noisy:
            return same_block if key_noisy else remembered(query, key)
        return not key_noisy and (same_block or remembered(query, key))

    total = frames * (2 if teacher_forcing else 1)
    by_frame = torch.tensor([[sees(i, j) for j in range(total)] for i in range(total)])
    return by_frame.repeat_interleave(N, 0).repeat_interleave(N, 1)


def inputs(total, dtype, requires_grad=True):
    made = [states(1, total * N, 2, 16, dtype=dtype, seed=s) for s in range(3)]
    return [x.requires_grad_(requires_grad) for x in made]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_forward_and_backward_equal_a_mask_per_token(name, dtype, backend):
    if dtype == torch.float64 and backend != "torch":
        pytest.skip("float64 is computed by the torch backend on every backend")
    total, arguments = MASKS[name]
    leaves, upstream = inputs(total, dtype), states(1, total * N, 2, 16, dtype=dtype, seed=9)
    table = block_causal_table(**arguments, heads=2)
    with poisoned_memory():
        out = memory_attention(*leaves, tokens_per_frame=N, candidate_frames=total, frame_table=table, query_block=N)
        grads = torch.autograd.grad(out, leaves, upstream)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    mask = visible(**arguments).to(upstream.device)
    right = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in wide), attn_mask=mask).transpose(1, 2)
    expected = torch.autograd.grad(right, wide, upstream.double())
    for ours, exact in zip((out, *grads), (right, *expected), strict=True):
        assert_close(ours, exact)


@pytest.mark.parametrize("name", MASKS)
def test_the_table_names_what_is_seen_once_and_in_order(name):
    total, arguments = MASKS[name]
    rows = block_causal_table(**arguments)[0, 0].tolist()
    mask = visible(**arguments)[::N, ::N]
    assert len(rows) == total
    for row, seen in zip(rows, mask, strict=True):
        frames = seen.nonzero().flatten().tolist()
        assert row == frames + [-1] * (len(row) - len(frames))


def test_the_torch_backend_copies_no_keys(monkeypatch):
    """Frames that all heads see are read where they lie: nothing is gathered."""
    from memflow_kernels.reference import shown

    def gathered(*_):
        raise AssertionError("frames were gathered")

    monkeypatch.setattr(shown, "Gathered", gathered)
    for total, arguments in MASKS.values():
        table = block_causal_table(**arguments, heads=2)
        leaves = inputs(total, torch.float32)
        out = memory_attention(*leaves, tokens_per_frame=N, candidate_frames=total, frame_table=table, query_block=N)
        torch.autograd.grad(out.sum(), leaves)


def test_rows_and_heads_share_their_memory():
    table = block_causal_table(3, 1, batch=4, heads=5)
    assert table.shape == (4, 5, 3, 3)
    assert table.untyped_storage().nbytes() == 9 * 4
    assert table.dtype == torch.int32


def test_the_example_of_the_docstring():
    assert doctest.testmod(masks).failed == 0
    assert doctest.testmod(masks).attempted == 3


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((0, 1), {}, ValueError, "frames must be at least 1, got 0"),
        ((3, 0), {}, ValueError, "frames_per_block must be at least 1, got 0"),
        ((3, 1.0), {}, TypeError, "frames_per_block must be an int, got float"),
        ((9, 3), {"local": 2}, ValueError, "local must be at least 3, got 2"),
        ((9, 3), {"local": 3, "first_block": 4}, ValueError, "local must be at least 4, got 3"),
        ((9, 3), {"sink": -1}, ValueError, "sink must be at least 0, got -1"),
        ((9, 3), {"sink": 3}, ValueError, "sink has no effect without local"),
        ((9, 3), {"heads": 0}, ValueError, "heads must be at least 1, got 0"),
    ],
)
def test_bad_input(arguments, options, error, message):
    with pytest.raises(error, match=message):
        block_causal_table(*arguments, **options)

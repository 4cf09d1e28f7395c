"""What memory_attention reads, copies and writes: the frames that were chosen, and nothing else."""

import pytest
import torch

from memflow_kernels import memory_attention
from memflow_kernels.testing import (
    ATTENTION_CASES,
    Traffic,
    assert_close,
    attention_inputs,
    states,
)

BACKENDS = pytest.mark.usefixtures("backend")


@BACKENDS
def test_frames_that_nobody_chose_are_not_read():
    query, key, value = (states(1, tokens, 2, 8, seed=seed) for seed, tokens in enumerate((6, 35, 35)))
    table = torch.tensor([[[1, 1], [-1, 1]]], dtype=torch.int32)
    options = {"tokens_per_frame": 7, "candidate_frames": 3, "frame_table": table}
    clean = memory_attention(query, key, value, **options)
    for x in (key, value):
        x[:, :7] = x[:, 14:21] = torch.nan
    assert torch.equal(memory_attention(query, key, value, **options), clean)


@pytest.mark.parametrize("layout", ["dense", "sliced", "heads_first", "fused"])
def test_dense_copies_nothing(layout):
    """One fused call on the views: nothing is written but the result and its log-sum-exp."""
    query, key, value = attention_inputs(ATTENTION_CASES[0], layout=layout)
    query = query.contiguous()
    with Traffic() as traffic:
        memory_attention(query, key, value, tokens_per_frame=12)
    lse = query[..., :1].nbytes
    (name, size), *others = traffic.written
    assert "flash_attention" in name
    assert size == query.nbytes + lse
    assert sum(size for _, size in others) <= lse  # the log-sum-exp in the order of its dimensions


def test_activation_gathers_only_what_was_chosen():
    query, key, value = (states(1, tokens, 2, 64, layout="sliced", seed=tokens) for tokens in (4, 15 * 120, 15 * 120))
    table = torch.tensor([[[0, 2, 5], [1, 3, 4]]], dtype=torch.int32)
    with Traffic() as traffic:
        memory_attention(query, key, value, tokens_per_frame=120, candidate_frames=6, frame_table=table)
    chosen = 3 * key[:, :120].nbytes
    copied = [(name, size) for name, size in traffic.written if size >= key[:, :120].nbytes]
    assert copied == [("aten::index", chosen), ("aten::index", chosen)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_attended_to_in_one_call(dtype):
    """Everything is copied next to what was chosen there, once; the result and its gradients are as exact."""
    query, key, value = (
        states(2, tokens, 2, 64, layout="sliced", seed=tokens, dtype=dtype).requires_grad_()
        for tokens in (4, 1200, 1201)
    )
    value = value[:, 1:]
    table = torch.tensor([[[0, 2, 5], [1, 3, 4]], [[3, 3, 2], [0, 1, 2]]], dtype=torch.int32)
    options = {"tokens_per_frame": 80, "candidate_frames": 6, "frame_table": table}
    with Traffic() as traffic, torch.no_grad():
        memory_attention(query, key, value, **options)
    assert [name for name, size in traffic.written if size >= key[:, :80].nbytes] == ["aten::cat", "aten::cat"]
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    results = []
    for inputs in (leaves, wide):
        out = memory_attention(*inputs, **options)
        results.append((out, *torch.autograd.grad(out, inputs, states(2, 4, 2, 64, seed=7).to(out.dtype))))
    for ours, exact in zip(*results, strict=True):
        assert_close(ours, exact, roundings=3)


def test_frames_that_all_heads_chose_are_not_gathered():
    query, key, value = (states(1, tokens, 2, 64, layout="sliced", seed=tokens) for tokens in (4, 15 * 80, 15 * 80))
    table = torch.tensor([[[1, 2, 5], [1, 2, 5]]], dtype=torch.int32)
    with Traffic() as traffic:
        out = memory_attention(query, key, value, tokens_per_frame=80, candidate_frames=6, frame_table=table)
    assert all(size < key[:, :80].nbytes for _, size in traffic.written)
    gathered = torch.cat([torch.arange(80 * f, 80 * (f + 1)) for f in (1, 2, 5, *range(6, 15))])
    assert_close(
        out, memory_attention(*(x.double() for x in (query, key[:, gathered], value[:, gathered])), tokens_per_frame=80)
    )

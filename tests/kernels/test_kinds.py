"""Arguments are checked once per kind, and whatever is of another kind is checked again."""

from __future__ import annotations

import pytest
import torch

from memflow_kernels import Pool, memory_attention, qk_norm_rope_write
from memflow_kernels.ops._checks import once_per_kind


def counting():
    calls = []

    @once_per_kind
    def check(*arguments):
        calls.append(arguments)
        if arguments[-1] == "bad":
            raise ValueError("bad")

    return check, calls


def test_a_kind_is_checked_once_and_every_other_again():
    check, calls = counting()
    x = torch.zeros(2, 3)
    others = [
        (torch.zeros(2, 4), 1),
        (torch.zeros(3, 2).T, 1),
        (x.double(), 1),
        (torch.nn.Parameter(x), 1),
        (x.to_sparse(), 1),
        (x.to("meta"), 1),
        (x, True),
        (x, 1.0),
        (x, 2),
        (x, None),
        ((x,), 1),
        (Pool(x, x, x), 1),
    ]
    for arguments in [(x, 1), *others]:
        seen = len(calls)
        check(*arguments)
        check(*arguments)
        assert len(calls) == seen + 1, f"{arguments} was taken for another kind, or not remembered"
    check(torch.ones(2, 3), 1)
    assert len(calls) == len(others) + 1, "numbers are no part of a kind"


def test_what_was_refused_or_has_no_kind_is_checked_every_time():
    check, calls = counting()
    for _ in range(2):
        with pytest.raises(ValueError):
            check("bad")
        check([1, 2])
    assert len(calls) == 4


def test_many_kinds_take_no_memory():
    check, calls = counting()
    for number in range(2000):
        check(number)
    assert len(check.__closure__[1].cell_contents) <= 512 and len(calls) == 2000


def test_a_good_call_hides_no_bad_one():
    query = torch.randn(1, 8, 2, 4)
    memory_attention(query, query, query, tokens_per_frame=4, candidate_frames=1, top_k=1)
    with pytest.raises(TypeError, match="candidate_frames must be an int"):
        memory_attention(query, query, query, tokens_per_frame=4, candidate_frames=True, top_k=1)
    with pytest.raises(TypeError, match="top_k must be an int"):
        memory_attention(query, query, query, tokens_per_frame=4, candidate_frames=1, top_k=1.0)

    weight, pool = torch.ones(8), Pool.zeros(1, 3, 4, 2, 4)
    slots = torch.tensor([0, 2], dtype=torch.int32)
    write = {"weight_q": weight, "weight_k": weight, "eps": 1e-6, "grid": (2, 2), "pool": pool, "slots": slots}
    with torch.no_grad():
        qk_norm_rope_write(query, query, query, **write, start_frame=0)
    with pytest.raises(ValueError, match="start_frame must be at least 0"):
        qk_norm_rope_write(query, query, query, **write, start_frame=-1)
    with pytest.raises(RuntimeError, match="has no gradient"):
        qk_norm_rope_write(query.clone().requires_grad_(), query, query, **write, start_frame=0)

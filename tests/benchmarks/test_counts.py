"""Operations and bytes against counting them one by one."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from memflow_bench import counts
from memflow_bench.states import our_memory
from memflow_bench.workloads import Update

SIZE = 2  # bytes of an element
MEAN = 4  # of a frame mean's


@pytest.mark.parametrize("activated", [False, True])
def test_attention(tiny, activated):
    case = replace(tiny, heads=2, head_dim=3, grid=(1, 2), bank=2, sink=1, window=3, chunk=1)
    operations, touched = 0, set()
    for b, h in product(range(case.batch), range(case.heads)):
        chosen = range(1, 1 + min(case.top_k, case.candidates)) if activated else range(case.candidates)
        frames = [*chosen, *range(case.candidates, case.frames)]
        for q, frame, token, d in product(range(case.queries), frames, range(case.tokens), range(case.head_dim)):
            operations += 2 + 2  # a multiplication and an addition for the logit, as many for the output
            for name, place in (("q", q), ("o", q), ("k", (frame, token)), ("v", (frame, token))):
                touched.add((name, b, h, place, d))
    assert counts.attention_flops(case, activated) == operations
    assert counts.attention_bytes(case, activated, SIZE) == SIZE * len(touched)


def test_means(tiny):
    elements = list(product(range(tiny.batch), range(tiny.candidates), range(tiny.tokens), range(tiny.dim)))
    means = {(b, f, d) for b, f, _, d in elements}
    assert counts.means_bytes(tiny, SIZE) == SIZE * len(elements) + MEAN * len(means)


def test_write(tiny):
    names = ("query", "key", "value", "turned query", "held key", "held value")
    elements = list(product(names, range(tiny.batch), range(tiny.queries), range(tiny.dim)))
    means = list(product(range(tiny.batch), range(tiny.chunk), range(tiny.dim)))
    assert counts.write_bytes(tiny, SIZE) == SIZE * len(elements) + MEAN * len(means)


def test_update(tiny):
    total = 0
    for _layer, _row in product(range(3), range(tiny.batch)):
        total += SIZE * tiny.text_tokens * tiny.dim  # the prompt
        total += MEAN * tiny.bank * tiny.dim  # the means that it is compared with
        total += 2 * (2 * SIZE * tiny.tokens * tiny.dim + MEAN * tiny.dim)  # a frame, read and written
    assert counts.update_bytes(tiny, SIZE, 3) == total


def test_an_update_changes_what_is_counted_as_written(tiny):
    """The frame that moves, in one layer and row: K, V and mean."""
    workload = Update(replace(tiny, batch=1), False, torch.float32, torch.device("cpu"))
    memory, step = our_memory(workload.state)
    before = [x.clone() for x in memory.layer_pools[0]]
    memory.update(workload.state.start_frame, step.prompt)
    changed = sum(int((a != b).sum()) for a, b in zip(before, memory.layer_pools[0], strict=True))
    assert changed == tiny.dim * (2 * tiny.tokens + 1)


def test_linears(tiny):
    operations = sum(2 for _ in product(range(4), range(tiny.queries), range(tiny.dim), range(tiny.dim)))
    assert counts.linear_flops(replace(tiny, batch=1)) == operations

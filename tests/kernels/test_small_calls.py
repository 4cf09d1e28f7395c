"""What a small call on the CPU takes another way: chosen frames copied line by line, scores sorted by the host,
choice and attention at once."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import cases

from memflow_kernels import frame_means, memory_attention, select_frames
from memflow_kernels.reference import selection
from memflow_kernels.reference.attend import attend
from memflow_kernels.reference.shown import Gathered, Range, _lines
from memflow_kernels.testing import LAYOUTS, poisoned_memory, states

together = importlib.import_module("memflow_kernels.reference.memory_attention_top_k")
KERNELS = settings.get_profile("kernels")


def gathered(states_, table, tokens, candidates):
    rows, columns = torch.arange(table.shape[0])[:, None, None], torch.arange(table.shape[1])[:, None]
    frames = states_.unflatten(1, (-1, tokens)).permute(0, 3, 1, 2, 4)[rows, columns, table.clamp(min=0).long()]
    frames[table < 0] = 0.0
    behind = states_[:, candidates * tokens :].transpose(1, 2)
    return torch.cat([frames.flatten(2, 3), behind], 2).transpose(1, 2)


@KERNELS
@given(cases(), st.integers(1, 5), st.integers(1, 4), st.booleans(), st.sampled_from(LAYOUTS))
def test_chosen_frames_are_copied_as_indexing_does(case, candidates, places, some_empty, other_layout):
    """key and value in layouts of their own; frames named twice, empty places."""
    candidates = min(candidates, case.frames)
    generator = torch.Generator().manual_seed(case.seed)
    shape = (case.batch, case.heads, places)
    table = torch.randint(-1 if some_empty else 0, candidates, shape, generator=generator, dtype=torch.int32)
    key = case.key()
    value = states(*key.shape, dtype=case.dtype, layout=other_layout, seed=case.seed)
    rest = Range(candidates * case.tokens_per_frame, key.shape[1])
    part = Gathered(table, table.flatten(0, 1).tolist(), case.tokens_per_frame, torch.float32, rest)
    with poisoned_memory():
        for x in (key, value, key):
            assert torch.equal(part.of(x), gathered(x, table, case.tokens_per_frame, candidates))


@pytest.mark.parametrize("layout", ["dense", "heads_first", "fused", "sliced"])
def test_common_layouts_are_copied_by_lines(layout):
    table = torch.tensor([[[0, 2], [1, 2]]], dtype=torch.int32)
    part = Gathered(table, table[0].tolist(), 3, torch.float32, Range(9, 15))
    assert part._lines_of(states(1, 15, 2, 8, layout=layout)) is not None
    assert part._lines_of(states(1, 15, 2, 8, layout="padded")) is None
    shared = states(1, 15, 1, 8).expand(1, 15, 2, 8)  # stride 0
    assert torch.equal(part.of(shared), gathered(shared, table, 3, 3))
    last = torch.randn(15 * 2 * 8 + 8)[8:].view(1, 15, 2, 8)  # ends where its memory does
    assert torch.equal(part.of(last), gathered(last, table, 3, 3))


def test_lines_found_in_inference_serve_training():
    _lines.cache_clear()
    query, key, value = (states(1, n, 2, 8, seed=n) for n in (4, 15, 15))
    options = {"tokens_per_frame": 3, "candidate_frames": 3, "frame_table": torch.tensor([[[0, 2], [1, 2]]]).int()}
    choice = {"tokens_per_frame": 3, "candidate_frames": 3, "top_k": 2}
    with torch.inference_mode():
        first = memory_attention(query, key, value, **options)
        together._layout.cache_clear()
        chosen = memory_attention(query, key, value, **choice)
    leaves = [x.requires_grad_() for x in (query, key, value)]
    for options_, before in ((options, first), (choice, chosen)):
        out = memory_attention(*leaves, **options_)
        assert torch.equal(out, before)
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), leaves))


@KERNELS
@given(cases(), st.integers(1, 7), st.integers(1, 9), st.booleans())
def test_the_host_sorts_as_torch_does(case, top_k, query_block, ties):
    query, means = case.query(), frame_means(case.key(), case.tokens_per_frame)
    if ties:
        means = means[:, :1].round().expand_as(means)
    for block in (None, query_block):
        table = select_frames(query, means, top_k, query_block=block)
        few, selection.FEW = selection.FEW, -1
        try:
            assert torch.equal(table, select_frames(query, means, top_k, query_block=block))
        finally:
            selection.FEW = few


def test_scores_that_the_host_does_not_sort():
    """NaN, and infinities whose sum is NaN; zeros of both signs are equal."""
    for numbers, best in (
        ([1.0, torch.nan, 3.0], [1, 2]),
        ([-torch.inf, torch.inf, 0.0], [1, 2]),
        ([-0.0, 0.0, -0.0], [0, 1]),
        ([torch.inf, torch.inf, torch.inf], [0, 1]),
    ):
        means = torch.tensor(numbers).view(1, 3, 1, 1)
        assert select_frames(torch.ones(1, 2, 1, 1), means, 2).tolist() == [[best]]


@KERNELS
@given(cases(), st.integers(1, 4), st.integers(1, 3), st.booleans(), st.sampled_from(LAYOUTS))
def test_at_once_is_in_steps(case, candidates, top_k, known, value_layout):
    """The choice of select_frames, and to the bit attention over chosen and later frames side by side; in every layout
    that is made of lines, if keys and values have the same, also where all heads chose the same."""
    case.frames += 16
    key = case.states(case.frames * case.tokens_per_frame, 1)
    value = states(*key.shape, dtype=case.dtype, layout=value_layout, seed=case.seed)
    means = frame_means(key, case.tokens_per_frame)[:, : candidates + top_k] if known else None
    mean_query = case.query().to(means.dtype).mean(1) if known else None
    sizes = (case.tokens_per_frame, candidates + top_k, top_k, 0.3)
    arguments = (case.query(), key, value, means, mean_query, *sizes)
    with poisoned_memory():
        table = together._in_steps(*arguments, None)[2]
        copies = [gathered(x, table, case.tokens_per_frame, candidates + top_k) for x in (key, value)]
        expected = (*attend(case.query(), *copies, 0.3), table)
        found = together._at_once(*arguments)
    if case.layout == value_layout != "padded":
        assert found is not None
    if found is not None:
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert all(x.is_contiguous() for x in found)


@pytest.mark.parametrize(
    "changed",
    [{"heads": 9}, {"tokens": 4000}, {"layout": "padded"}, {"value_layout": "heads_first"}, {"stride": 2**26}],
)
def test_at_once_leaves_other_calls_to_the_steps(changed):
    """More scores or keys than are few, keys that are not made of lines, lines past what int32 counts."""
    sizes = {"heads": 2, "tokens": 5, "layout": "dense", "value_layout": None, "stride": None, **changed}
    heads, tokens = sizes["heads"], sizes["tokens"]
    query = states(1, 3, heads, 16)
    key = states(1, 30 * tokens, heads, 16, layout=sizes["layout"], seed=1)
    value = states(1, 30 * tokens, heads, 16, layout=sizes["value_layout"] or sizes["layout"], seed=2)
    if sizes["stride"] is not None:
        shape = key.shape
        assert together._layout(shape, (0, 16, 16, 1), tokens, 29, 2) is not None
        assert together._layout(shape, (0, 16 * sizes["stride"], 16, 1), tokens, 29, 2) is None
    else:
        arguments = (query, key, value, None, None, tokens, 29, 2, 0.3)
        assert together._at_once(*arguments) is None
        assert together.memory_attention_top_k(*arguments, None)[0].isfinite().all()


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_at_once_leaves_numbers_that_are_not_numbers_to_the_steps(number):
    query, key, value = (states(1, n, 2, 16, layout="heads_first", seed=n) for n in (6, 45, 46))
    value = value[:, :45].transpose(1, 2).contiguous().transpose(1, 2)
    key[0, 0, 1, 3] = number
    options = {"tokens_per_frame": 5, "candidate_frames": 4}
    table = select_frames(query, frame_means(key[:, :20], 5), 2)
    chosen = memory_attention(query, key, value, top_k=2, **options)
    torch.testing.assert_close(
        chosen, memory_attention(query, key, value, frame_table=table, **options), rtol=0, atol=0, equal_nan=True
    )


def test_the_choice_is_that_of_select_frames():
    """Whatever way means and table are made."""
    for seed in range(20):
        query, key, value = (states(2, n, 3, 16, seed=3 * seed + s) for s, n in enumerate((6, 45, 45)))
        table = select_frames(query, frame_means(key[:, :20], 5), 2)
        options = {"tokens_per_frame": 5, "candidate_frames": 4}
        chosen = memory_attention(query, key, value, top_k=2, **options)
        assert torch.equal(chosen, memory_attention(query, key, value, frame_table=table, **options))


@pytest.mark.parametrize("keys", [1, 3, 15, 16, 40])
def test_a_query_that_is_no_number_gives_none_however_few_keys_there_are(keys):
    """Of fewer keys than a register holds torch's kernel takes a row of NaN for one without keys: 0 would come out."""
    query, key, value = (states(1, n, 2, 16, seed=n) for n in (4, keys, keys + 1))
    query[0, 1, 0, 3] = torch.nan
    out = memory_attention(query, key, value[:, :keys], tokens_per_frame=1)
    assert out[0, 1, 0].isnan().all()
    assert out.isnan().sum() == 16

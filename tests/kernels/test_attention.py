import loops
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES, cases

from memflow_kernels import frame_means, memory_attention, select_frames
from memflow_kernels.reference.attend import plain
from memflow_kernels.testing import (
    ATTENTION_CASES,
    assert_close,
    attention_inputs,
    draw,
    poisoned_memory,
    states,
)

KERNELS = settings.get_profile("kernels")
BACKENDS = pytest.mark.usefixtures("backend")
ROUNDINGS = 3  # the shares, the two partial results, their sum


def check(inputs, tokens_per_frame, scale=None, table=None, candidate_frames=0, **options):
    """memory_attention(**options) equals the loop over the frames of `table`."""
    with poisoned_memory():
        out, lse = memory_attention(
            *inputs,
            tokens_per_frame=tokens_per_frame,
            candidate_frames=candidate_frames,
            scale=scale,
            return_lse=True,
            **options,
        )
    query = inputs[0]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    expected, expected_lse = loops.attention(*inputs, tokens_per_frame, scale, table, candidate_frames)
    assert out.dtype == query.dtype
    assert out.is_contiguous()
    assert_close(out, torch.from_numpy(expected), roundings=ROUNDINGS)
    assert lse.dtype == (torch.float64 if query.dtype == torch.float64 else torch.float32)
    assert_close(lse, torch.from_numpy(expected_lse), dtype=query.dtype)


@BACKENDS
@KERNELS
@given(cases(), st.sampled_from([None, 0.2, -0.3, 0.0]), st.integers(0, 6))
def test_dense_equals_the_loop(case, scale, candidate_frames):
    """Without top_k the candidates are frames like any other."""
    candidates = min(candidate_frames, case.frames)
    check((case.query(), case.key(), case.value()), case.tokens_per_frame, scale, candidate_frames=candidates)


@BACKENDS
@KERNELS
@given(cases(), st.integers(0, 6), st.integers(1, 7), st.booleans())
def test_activation_equals_the_loop(case, candidate_frames, top_k, means_given):
    """top_k above and below the number of candidates, with and without frames that are always attended to."""
    query, key, value = case.query(), case.key(), case.value()
    candidates = min(candidate_frames, case.frames)
    means = frame_means(key[:, : candidates * case.tokens_per_frame], case.tokens_per_frame)
    table = select_frames(query, means, top_k) if candidates else None
    options = {"frame_mean": means, "query_mean": frame_means(query, query.shape[1])[:, 0]} if means_given else {}
    check(
        (query, key, value),
        case.tokens_per_frame,
        table=table,
        candidate_frames=candidates,
        top_k=top_k,
        **options,
    )


@BACKENDS
@KERNELS
@given(cases(), st.integers(0, 6), st.integers(0, 4))
def test_table_equals_the_loop(case, candidate_frames, places):
    """Tables with empty places, with frames named twice, of no place at all."""
    candidates = min(candidate_frames, case.frames)
    shape = (case.batch, case.heads, places)
    table = draw(torch.randint, -1, max(candidates, 0), shape, seed=case.seed, dtype=torch.int32)
    inputs = (case.query(), case.key(), case.value())
    check(inputs, case.tokens_per_frame, table=table, candidate_frames=candidates, frame_table=table)


@BACKENDS
@settings(KERNELS, max_examples=12)
@given(cases(dtypes=(torch.float32, torch.bfloat16)), st.integers(1, 5), st.integers(0, 3), st.integers(1, 8))
def test_every_block_of_queries_has_a_table_of_its_own(case, candidate_frames, places, query_block):
    """Blocks that do not divide the queries, and blocks longer than all of them."""
    candidates = min(candidate_frames, case.frames)
    blocks = -(-case.queries // query_block)
    shape = (case.batch, case.heads, blocks, places)
    table = draw(torch.randint, -1, candidates, shape, seed=case.seed, dtype=torch.int32)
    query, key, value = case.query(), case.key(), case.value()
    options = {"tokens_per_frame": case.tokens_per_frame, "candidate_frames": candidates}
    with poisoned_memory():
        out, lse = memory_attention(
            query, key, value, frame_table=table, query_block=query_block, return_lse=True, **options
        )
    scale = case.head_dim**-0.5
    for block, queries in enumerate(query.split(query_block, 1)):
        rows = slice(block * query_block, block * query_block + queries.shape[1])
        expected, expected_lse = loops.attention(
            queries, key, value, case.tokens_per_frame, scale, table[:, :, block], candidates
        )
        assert_close(out[:, rows], torch.from_numpy(expected), roundings=ROUNDINGS)
        assert_close(lse[:, :, rows], torch.from_numpy(expected_lse))


@BACKENDS
@pytest.mark.parametrize("means_given", [False, True])
def test_every_block_of_queries_chooses_for_itself(means_given):
    query, key, value = (states(2, tokens, 2, 8, seed=seed) for seed, tokens in enumerate((10, 30, 30)))
    means = frame_means(key[:, :20], 5)
    options = {"tokens_per_frame": 5, "candidate_frames": 4, "query_block": 4}
    out = memory_attention(query, key, value, top_k=2, frame_mean=means if means_given else None, **options)
    table = select_frames(query, means, 2, query_block=4)
    assert torch.equal(out, memory_attention(query, key, value, frame_table=table, **options))
    assert len({tuple(row) for row in table.flatten(0, 2).tolist()}) > 1


@BACKENDS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ATTENTION_CASES, ids=lambda case: case.name)
def test_cases(case, dtype):
    inputs = attention_inputs(case, dtype=dtype, layout="fused")
    table = None
    if case.top_k is not None:
        means = frame_means(inputs[1][:, : case.candidate_frames * case.tokens_per_frame], case.tokens_per_frame)
        table = select_frames(inputs[0], means, case.top_k)
    check(inputs, case.tokens_per_frame, table=table, candidate_frames=case.candidate_frames, top_k=case.top_k)


@KERNELS
@given(cases(), st.booleans())
def test_the_path_of_other_devices_equals_the_loop(case, masked):
    """The plain products that run where there is no fused CPU kernel, in blocks of keys."""
    query, key, value = case.query(), case.key(), case.value()
    tokens, scale = key.shape[1], case.head_dim**-0.5
    bias = torch.zeros(case.batch, case.heads, 1, tokens)
    table = [[list(range(tokens))] * case.heads] * case.batch
    if masked:
        generator = torch.Generator().manual_seed(case.seed)
        dropped = torch.rand(bias.shape, generator=generator) < 0.5
        bias = bias.masked_fill(dropped, -torch.inf)
        table = [
            [[j for j in range(tokens) if not dropped[b, h, 0, j]] for h in range(case.heads)]
            for b in range(case.batch)
        ]
    expected, expected_lse = loops.attention(query, key, value, 1, scale, table, tokens)
    out, lse = plain(query, key, value, scale, bias if masked else None, keys_per_block=4)
    assert_close(out, torch.from_numpy(expected))
    assert_close(lse, torch.from_numpy(expected_lse))


@BACKENDS
def test_no_key_gives_zero_and_minus_infinity():
    query, key, value = (states(2, tokens, 2, 4, seed=seed) for seed, tokens in enumerate((3, 6, 6)))
    table = torch.tensor([[[0, 1], [-1, -1]], [[-1, -1], [-1, 1]]], dtype=torch.int32)
    out, lse = memory_attention(
        query, key, value, tokens_per_frame=3, candidate_frames=2, frame_table=table, return_lse=True
    )
    assert torch.equal(out[0, :, 1], torch.zeros(3, 4))
    assert torch.equal(lse[0, 1], torch.full((3,), -torch.inf))
    assert torch.isfinite(out).all()
    assert torch.isfinite(lse[1, 1]).all()


@BACKENDS
def test_top_k_of_all_candidates_is_dense():
    query, key, value = (states(2, tokens, 2, 4, seed=seed) for seed, tokens in enumerate((3, 12, 12)))
    dense = memory_attention(query, key, value, tokens_per_frame=3)
    for top_k in (3, 4, 100):
        kept = memory_attention(query, key, value, tokens_per_frame=3, candidate_frames=3, top_k=top_k)
        assert torch.equal(kept, dense)


@BACKENDS
def test_same_result_every_time():
    inputs = attention_inputs(ATTENTION_CASES[1])
    options = {"tokens_per_frame": 12, "candidate_frames": 6, "top_k": 3}
    leaves = [x.requires_grad_() for x in inputs]
    runs = [memory_attention(*leaves, **options) for _ in range(2)]
    assert torch.equal(*runs)
    first, second = (torch.autograd.grad(out.square().sum(), leaves) for out in runs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


QUERY, KEY = torch.zeros(2, 3, 2, 4), torch.zeros(2, 8, 2, 4)
SIZES = {"tokens_per_frame": 2}


def int32(*shape):
    return torch.zeros(shape, dtype=torch.int32)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((QUERY[0], KEY, KEY), SIZES, ValueError, "query must be .* 4 dimensions"),
        ((QUERY.long(), KEY, KEY), SIZES, TypeError, "query must be float32.*got torch.int64"),
        ((QUERY, KEY.half(), KEY), SIZES, TypeError, "key must have the dtype of query, torch.float32"),
        ((QUERY, KEY, KEY[:, :6]), SIZES, ValueError, r"value must be .* = \[2, 8, 2, 4\], got \[2, 6, 2, 4\]"),
        ((QUERY, KEY[:, :, :1], KEY), SIZES, ValueError, r"value must be .* = \[2, 8, 1, 4\], got \[2, 8, 2, 4\]"),
        ((QUERY, KEY.to("meta"), KEY), SIZES, ValueError, "key must be on the device of query, cpu, got meta"),
        ((QUERY, KEY, KEY), {"tokens_per_frame": 3}, ValueError, "not a multiple of tokens_per_frame = 3"),
        ((QUERY, KEY, KEY), {"tokens_per_frame": -2}, ValueError, "tokens_per_frame must be at least 1, got -2"),
        ((QUERY, KEY, KEY), {"candidate_frames": 5}, ValueError, "candidate_frames must be at most the 4 frames"),
        ((QUERY, KEY, KEY), {"candidate_frames": -1}, ValueError, "candidate_frames must be at least 0, got -1"),
        ((QUERY, KEY, KEY), {"candidate_frames": 2, "top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
        ((QUERY, KEY, KEY), {"top_k": "3"}, TypeError, "top_k must be an int, got str"),
        ((QUERY, KEY, KEY), {"scale": float("inf")}, ValueError, "scale must be finite"),
        ((QUERY, KEY, KEY), {"frame_table": int32(2, 2, 1), "top_k": 1}, ValueError, "top_k must be None with it"),
        ((QUERY, KEY, KEY), {"frame_table": int32(2, 2, 1).long()}, TypeError, "frame_table must be int32"),
        (
            (QUERY, KEY, KEY),
            {"frame_table": int32(2, 3, 1)},
            ValueError,
            r"frame_table must be \[B, H, n\] = \[2, 2, 1\]",
        ),
        ((QUERY, KEY, KEY), {"frame_table": int32()}, ValueError, r"frame_table must be \[B, H, n\]"),
        (
            (QUERY, KEY, KEY),
            {"frame_table": int32(2, 2, 1) + 3, "candidate_frames": 3},
            ValueError,
            "frame_table holds 3 to 3: .* below candidate_frames = 3",
        ),
        ((QUERY, KEY, KEY), {"frame_table": int32(2, 2, 1) - 2}, ValueError, "frame_table holds -2 to -2"),
        (
            (QUERY, KEY, KEY),
            {"query_block": 2},
            ValueError,
            "query_block = 2 .* needs top_k or frame_table, got neither",
        ),
        ((QUERY, KEY, KEY), {"query_block": 0}, ValueError, "query_block must be at least 1, got 0"),
        (
            (QUERY, KEY, KEY),
            {"frame_table": int32(2, 2, 1), "query_block": 2},
            ValueError,
            r"frame_table must be \[B, H, blocks of query_block queries, n\] = \[2, 2, 2, 1\], got \[2, 2, 1\]",
        ),
        (
            (QUERY, KEY, KEY),
            {"query_mean": torch.zeros(2, 4, 2), "candidate_frames": 2, "top_k": 1},
            ValueError,
            r"query_mean must be \[B, H, D\] = \[2, 2, 4\], got \[2, 4, 2\]",
        ),
        (
            (QUERY, KEY, KEY),
            {"query_mean": torch.zeros(2, 2, 4), "candidate_frames": 2, "top_k": 1, "query_block": 2},
            ValueError,
            "query_mean is one mean for all queries: query_block must be None, got 2",
        ),
        (
            (QUERY, KEY, KEY),
            {"frame_mean": torch.zeros(2, 3, 2, 4), "candidate_frames": 2, "top_k": 1},
            ValueError,
            r"frame_mean must be .* = \[2, 2, 2, 4\], got \[2, 3, 2, 4\]",
        ),
    ],
)
def test_bad_input(arguments, options, error, message):
    with pytest.raises(error, match=message):
        memory_attention(*arguments, **{**SIZES, **options})


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_full_frames(dtype):
    """1560 tokens per frame, against plain float64 products."""
    query, key, value = (
        states(1, n, 2, 128, dtype=dtype, seed=s, mean=s // 2) for s, n in enumerate((1560, 9360, 9360))
    )
    means = frame_means(key[:, : 4 * 1560], 1560)
    table = select_frames(query, means, 2)
    out = memory_attention(query, key, value, tokens_per_frame=1560, candidate_frames=4, top_k=2, frame_mean=means)
    for head in range(2):
        kept = [*table[0, head].tolist(), 4, 5]
        rows = torch.cat([torch.arange(f * 1560, (f + 1) * 1560) for f in kept])
        logits = query[0, :, head].double() @ key[0, rows, head].double().T * 128**-0.5
        assert_close(out[0, :, head], logits.softmax(-1) @ value[0, rows, head].double(), roundings=ROUNDINGS)

"""memory_attention as its callers have their tensors: autocast, fewer key heads, another layout, numbers of numpy."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from memflow_kernels import frame_means, memory_attention
from memflow_kernels.testing import assert_close, states

BACKENDS = pytest.mark.usefixtures("backend")
TABLE = [[[0, 2], [-1, 1], [1, 1], [2, 0]], [[1, -1], [-1, -1], [0, 1], [2, -1]]]


def grouped(dtype=torch.float64, key_heads=2):
    """7 queries of 4 heads, 5 frames of 3 tokens of `key_heads`."""
    sizes = ((7, 4), (15, key_heads), (15, key_heads))
    return [states(2, n, heads, 8, dtype=dtype, seed=s, layout="padded") for s, (n, heads) in enumerate(sizes)]


@BACKENDS
@pytest.mark.parametrize("key_heads", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"candidate_frames": 3, "top_k": 2},
        {"candidate_frames": 3, "top_k": 1, "query_block": 7},
        {"candidate_frames": 3, "table": True},
    ],
    ids=["dense", "top_k", "blocks", "table"],
)
def test_fewer_key_heads_equal_repeated_ones(options, key_heads):
    options = {"tokens_per_frame": 3, "return_lse": True, **options}
    if options.pop("table", None):
        options["frame_table"] = torch.tensor(TABLE, dtype=torch.int32)
    inputs = [x.float() for x in grouped(key_heads=key_heads)]
    repeated = [inputs[0], *(x.repeat_interleave(4 // key_heads, 2) for x in inputs[1:])]
    for given, expected in zip(
        memory_attention(*inputs, **options), memory_attention(*repeated, **options), strict=True
    ):
        assert given.shape == expected.shape
        assert_close(given, expected)
    if "top_k" in options:
        means = frame_means(inputs[1][:, :9], 3)
        given = memory_attention(*inputs, **options, frame_mean=means)[0]
        assert torch.equal(given, memory_attention(*inputs, **options)[0])


def test_gradient_with_fewer_key_heads():
    leaves = [x.requires_grad_() for x in grouped()]
    options = {"tokens_per_frame": 3, "candidate_frames": 3, "top_k": 2, "return_lse": True}
    assert torch.autograd.gradcheck(lambda *x: memory_attention(*x, **options), leaves)


@pytest.mark.parametrize("queries", [0, 7])
def test_no_queries_of_fewer_key_heads(queries):
    query, key, value = grouped()
    out, lse = memory_attention(query[:, :queries], key, value, tokens_per_frame=3, return_lse=True)
    assert (out.shape, lse.shape) == ((2, queries, 4, 8), (2, 4, queries))


@BACKENDS
def test_heads_before_tokens():
    inputs = [x.float() for x in grouped(key_heads=4)]
    options = {"tokens_per_frame": 3, "candidate_frames": 3, "top_k": 2, "return_lse": True}
    out, lse = memory_attention(*(x.transpose(1, 2) for x in inputs), **options, layout="bhld")
    expected, expected_lse = memory_attention(*inputs, **options)
    assert torch.equal(out.transpose(1, 2), expected)
    assert torch.equal(lse, expected_lse)


def test_the_layout_of_sdpa_is_recognised():
    query, key = torch.randn(1, 2, 8, 16), torch.randn(1, 2, 24, 16)
    with pytest.raises(ValueError, match=r"8 heads, not a multiple of the 24 heads of key; .*layout='bhld'"):
        memory_attention(query, key, key, tokens_per_frame=4)
    with pytest.raises(ValueError, match=r"key has 2 tokens, not a multiple of tokens_per_frame = 4; .*layout='bhld'"):
        memory_attention(key, key, key, tokens_per_frame=4)
    with pytest.raises(ValueError, match="layout must be 'blhd' or 'bhld', got 'hbld'"):
        memory_attention(key, key, key, tokens_per_frame=4, layout="hbld")
    with pytest.raises(ValueError, match=r"query has 3 heads, not a multiple of the 2 heads of key$"):
        memory_attention(
            torch.randn(1, 5, 3, 16), torch.randn(1, 4, 2, 16), torch.randn(1, 4, 2, 16), tokens_per_frame=4
        )
    with pytest.raises(ValueError, match="query_block must divide the 7 queries where key has fewer heads"):
        memory_attention(*grouped(), tokens_per_frame=3, candidate_frames=2, top_k=1, query_block=3)


def test_a_choice_among_nothing_is_an_error():
    query, key, value = grouped(key_heads=4)
    with pytest.raises(ValueError, match="top_k = 2 needs candidate_frames: how many of the first 5"):
        memory_attention(query, key, value, tokens_per_frame=3, top_k=2)
    none = memory_attention(query, key, value, tokens_per_frame=3, candidate_frames=0, top_k=2)  # a memory yet empty
    assert torch.equal(none, memory_attention(query, key, value, tokens_per_frame=3))


def test_numbers_of_numpy():
    inputs = grouped()
    options = {"tokens_per_frame": 3, "candidate_frames": 3, "top_k": 2, "query_block": 7, "scale": 0.5}
    numbers = {name: np.float64(x) if name == "scale" else np.int64(x) for name, x in options.items()}
    assert torch.equal(memory_attention(*inputs, **numbers), memory_attention(*inputs, **options))
    with pytest.raises(TypeError, match="tokens_per_frame must be an int, got bool"):
        memory_attention(*inputs, tokens_per_frame=np.bool_(True))


@BACKENDS
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 3, (torch.bfloat16, torch.float32, torch.float32)], ids=str)
def test_autocast_as_torchs_attention(dtypes):
    """The format of autocast, also of mixed inputs; inside, nothing but that is lower than without it."""
    query, key, value = (x.to(dtype).requires_grad_() for x, dtype in zip(grouped(key_heads=4), dtypes, strict=True))
    kind = query.device.type
    with torch.autocast(kind, dtype=torch.bfloat16):
        out, lse = memory_attention(query, key, value, tokens_per_frame=3, return_lse=True)
        theirs = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)))
        chosen = memory_attention(query, key, value, tokens_per_frame=3, candidate_frames=3, top_k=2)
        out.sum().backward()
    assert out.dtype == theirs.dtype == chosen.dtype == torch.bfloat16
    assert (lse.dtype, query.grad.dtype, key.grad.dtype) == (torch.float32, dtypes[0], torch.float32)
    lower = [x.detach().bfloat16() for x in (query, key, value)]
    assert torch.equal(out, memory_attention(*lower, tokens_per_frame=3))
    assert torch.equal(chosen, memory_attention(*lower, tokens_per_frame=3, candidate_frames=3, top_k=2))


@BACKENDS
def test_autocast_leaves_the_other_formats_alone():
    key = states(1, 6, 2, 8)
    with torch.autocast(key.device.type, dtype=torch.bfloat16):
        means = frame_means(key, 3)
        double = memory_attention(key.double(), key.double(), key.double(), tokens_per_frame=3)
    assert torch.equal(means, frame_means(key, 3))
    assert torch.equal(double, memory_attention(key.double(), key.double(), key.double(), tokens_per_frame=3))


def test_autocast_compiles():
    inputs = [x.float() for x in grouped(key_heads=4)]

    def attend(query, key, value):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return memory_attention(query, key, value, tokens_per_frame=3, candidate_frames=3, top_k=2)

    assert torch.equal(torch.compile(attend, fullgraph=True, backend="aot_eager")(*inputs), attend(*inputs))


@pytest.mark.parametrize("name", ["frame_mean", "query_mean"])
@pytest.mark.parametrize("table", [False, True])
def test_means_without_a_choice_are_a_mistake(name, table):
    """Whoever gives them and forgets top_k would attend to everything."""
    query, key, value = (x.float() for x in grouped(key_heads=4))
    options = {"frame_mean": frame_means(key, 3)[:, :3], "query_mean": query.mean(1)}
    chosen = {"frame_table": torch.tensor(TABLE, dtype=torch.int32)} if table else {}
    with pytest.raises(ValueError, match=f"{name} is what heads choose frames by: it needs top_k, got top_k=None"):
        memory_attention(query, key, value, tokens_per_frame=3, candidate_frames=3, **chosen, **{name: options[name]})
    kept = memory_attention(query, key, value, tokens_per_frame=3, candidate_frames=3, top_k=3, **options)
    assert torch.equal(kept, memory_attention(query, key, value, tokens_per_frame=3))

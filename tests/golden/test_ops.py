"""The ops replayed against recorded calls of the published code; every case comes from the manifest.

Only what the manifest states is used: a directory that lacks a kind, or holds other cases of it, is replayed as it is.
"""

import golden
import pytest
import torch

from memflow_kernels import Pool, frame_means, memory_attention, prompt_relevance, replace_frame, select_frames
from memflow_kernels.reference import rms_norm, rotate_3d
from memflow_kernels.testing import assert_close


def cases(kind):
    recorded = golden.manifest().get(kind, {}).get("cases", [])
    return pytest.mark.parametrize("case", recorded, ids=lambda case: case["tag"])


def arrays(kind, case):
    """name -> the array `<tag>.<name>` of the case."""
    stored = golden.tensors(golden.manifest()[kind]["file"])
    prefix = case["tag"] + "."
    return {name.removeprefix(prefix): x for name, x in stored.items() if name.startswith(prefix)}


def assert_same(actual, expected):
    """float32 to 1e-6; half precision bit for bit but for one element in a thousand, which may round the other way."""
    assert actual.dtype == expected.dtype
    if expected.dtype in (torch.bfloat16, torch.float16):
        assert (actual != expected).double().mean() <= 1e-3
        torch.testing.assert_close(actual, expected, rtol=torch.finfo(expected.dtype).eps, atol=0)
    else:
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def tied(case):
    """Which of several equal scores survives is left open by the recorded code."""
    return case["ties_all_zero_scores"] or case["min_margin"] == 0


@cases("rope3d")
def test_rotation(case):
    recorded = arrays("rope3d", case)
    query = recorded["q"]
    frames, rows, cols = case["grid_fhw"]
    tokens = frames * rows * cols
    assert query.shape[1] == tokens + case["tail_tokens_passed_through"]
    for start_frame in case["start_frames"]:
        expected = recorded[f"out_start{start_frame}"]
        rotated = rotate_3d(query[:, :tokens], (rows, cols), start_frame)
        assert torch.equal(expected[:, tokens:], query[:, tokens:])  # padding is not rotated
        assert_same(rotated, expected[:, :tokens])


@cases("qk_norm")
def test_norm(case):
    recorded = arrays("qk_norm", case)
    normed = rms_norm(recorded["x"], recorded["weight"], golden.manifest()["qk_norm"]["eps"])
    assert_same(normed, recorded["out"])


@cases("sma_select")
def test_selection(case):
    """Scores, the chosen frames, and the attention over them: exactly that over the recorded keys and values."""
    recorded = arrays("sma_select", case)
    query, key, value = recorded["q"], recorded["k"], recorded["v"]
    tokens, top_k = case["tokens_per_frame"], case["top_k"]
    means = frame_means(key, tokens)
    scores = torch.einsum("bhd,bfhd->bhf", query.mean(1), means)
    torch.testing.assert_close(scores, recorded["scores"], rtol=1e-5, atol=1e-5)
    chosen = select_frames(query, means, top_k)
    if case["min_margin_between_kept_and_dropped"] != 0:
        assert torch.equal(chosen.long(), recorded["indices_sorted"])
    expected = memory_attention(query, recorded["selected_k"], recorded["selected_v"], tokens_per_frame=tokens)
    options = {"tokens_per_frame": tokens, "candidate_frames": case["frames"]}
    assert_close(memory_attention(query, key, value, top_k=top_k, **options), expected)
    table = recorded["indices_sorted"].to(torch.int32)
    assert_close(memory_attention(query, key, value, frame_table=table, **options), expected)


@cases("nam_compress")
def test_retrieval(case):
    """Scores, from keys and from frame means, and the frames kept, in the order of their scores."""
    recorded = arrays("nam_compress", case)
    text, key, tokens = recorded["text_k"], recorded["bank_k"], case["tokens_per_frame"]
    scores = prompt_relevance(text, key, tokens_per_frame=tokens)
    torch.testing.assert_close(scores, recorded["scores"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(prompt_relevance(text, frame_mean=frame_means(key, tokens)), scores, rtol=0, atol=0)
    kept = case["budget_frames"] - case["new_frames"]
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :kept]
    if not tied(case):
        assert torch.equal(order, recorded["kept_by_score"])
        assert order.tolist() == case["kept"]


@cases("nam_compress")
def test_replacement(case):
    """The bank after the new frames took the places of the least relevant ones, compared as a set of frames.

    A pool gives up slots in place, so its order differs from the recorded one; its frames must not.
    """
    recorded = arrays("nam_compress", case)
    tokens, bank, new = case["tokens_per_frame"], case["bank_frames"], case["new_frames"]
    batch, _, heads, head_dim = recorded["bank_k"].shape
    pool = Pool.zeros(batch, bank + new, tokens, heads, head_dim)  # the bank, then the pending frames
    for buffer, name in ((pool.key, "k"), (pool.value, "v")):
        buffer.copy_(torch.cat([recorded[f"bank_{name}"], recorded[f"new_{name}"]], dim=1))
    pool.frame_mean.copy_(frame_means(pool.key, tokens))

    scores = prompt_relevance(recorded["text_k"], frame_mean=pool.frame_mean[:, :bank])
    worst_first = scores.argsort(dim=1).to(torch.int32)
    for frame in range(new):
        source = torch.full((batch,), bank + frame, dtype=torch.int32)
        replace_frame(pool, worst_first[:, frame].contiguous(), source)
    assert torch.equal(pool.frame_mean, frame_means(pool.key, tokens))
    dropped = bank + new - case["budget_frames"]  # a budget below the bank gives up more slots than it fills
    for row in range(batch):
        given_up = worst_first[row, new:dropped].tolist()
        held = [slot for slot in range(bank) if slot not in given_up]
        for buffer, name in ((pool.key, "k"), (pool.value, "v")):
            kept = contents(buffer[row].unflatten(0, (-1, tokens))[held])
            assert len(held) == case["budget_frames"]
            assert kept >= contents(recorded[f"new_{name}"][row].unflatten(0, (-1, tokens)))
            if not tied(case):
                assert kept == contents(recorded[f"final_{name}"][row].unflatten(0, (-1, tokens)))


def contents(frames):
    """[F, N, H, D] as a set of frames."""
    return {frame.numpy().tobytes() for frame in frames}

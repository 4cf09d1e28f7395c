"""patch(): the same outputs and the same indices as the model's own attention, in the caller's own buffers."""

from __future__ import annotations

import gc

import pytest
import torch
from causal_wan import CHUNK, DIM, HEADS, TOKENS, DeferringModel, Generator, StoringModel, new_cache
from torch import nn

from memflow.integrations import attention, caller, contents, patch, unpatch
from memflow.memory import MemoryConfig
from memflow_kernels.testing import Traffic

SWITCHES = (4, 7)


def built(kind, **sizes) -> nn.Module:
    torch.manual_seed(0)
    return kind(**sizes).eval()


def patched(model: nn.Module, **memory) -> nn.Module:
    names = patch(model, memory=MemoryConfig.published(record_interval=1, **memory))
    assert names == ["blocks.0.self_attn", "blocks.1.self_attn"]
    return model


def told(generator: Generator, chunks: int = 10, empty: bool = False, between=None) -> Generator:
    for chunk in range(generator.position, chunks):
        if chunk in SWITCHES:
            generator.switch(empty)
        if between is not None:
            between(generator, chunk)
        generator.chunk()
    return generator


def assert_same(ours: Generator, theirs: Generator, tolerance: float = 1e-5) -> None:
    assert ours.seen == theirs.seen
    for call, (a, b) in enumerate(zip(ours.outputs, theirs.outputs, strict=True)):
        error = (a - b).abs().max().item()
        assert error <= tolerance, f"call {call} differs by {error:.3g}"
    for a, b in zip(ours.cache, theirs.cache, strict=True):
        for mine, other in zip(contents(a), (b["k"], b["v"]), strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=tolerance)
    for a, b in zip(ours.bank or [], theirs.bank or [], strict=True):
        for name in ("k", "v", "k_new", "v_new"):
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance)


@pytest.mark.parametrize("top_k", [None, 2], ids=["dense", "activated"])
@pytest.mark.parametrize("places", [None, 3], ids=["no bank", "bank"])
@pytest.mark.parametrize("kind", [StoringModel, DeferringModel])
def test_ten_chunks_with_switches(kind, places, top_k):
    sizes = {"batch": 2, "places": places}
    theirs = told(Generator(built(kind, top_k=top_k), **sizes))
    ours = told(Generator(patched(built(kind, top_k=top_k), top_k=top_k), **sizes))
    assert_same(ours, theirs)


@pytest.mark.parametrize(("slots", "sink"), [(6, 3), (9, 0), (13, 2)])
def test_other_sizes(slots, sink):
    def of_size():
        model = built(DeferringModel, sink=sink, top_k=2)
        for block in model.blocks:
            block.self_attn.local_attn_size, block.self_attn.max_attention_size = slots, slots * TOKENS
        return model

    theirs = told(Generator(of_size(), slots=slots))
    ours = patched(of_size(), top_k=2, local_frames=slots, sink_frames=sink)
    assert_same(told(Generator(ours, slots=slots)), theirs)


def test_a_switch_that_empties_the_cache():
    theirs = told(Generator(built(DeferringModel, top_k=2)), empty=True)
    assert_same(told(Generator(patched(built(DeferringModel, top_k=2), top_k=2)), empty=True), theirs)


@pytest.mark.parametrize("top_k", [None, 2], ids=["dense", "activated"])
def test_patching_and_unpatching_in_the_middle_of_a_stream(top_k):
    def toggle(generator, chunk):
        model = generator.model
        if chunk in (2, 6):
            patched(model, top_k=top_k)
        elif chunk in (5, 9):
            unpatch(model)
            assert not any("forward" in vars(module) for module in model.modules())

    theirs = told(Generator(built(DeferringModel, top_k=top_k)))
    assert_same(told(Generator(built(DeferringModel, top_k=top_k)), between=toggle), theirs)


@pytest.mark.parametrize("chunk", [2, 8], ids=["while the cache fills", "when it is full"])
def test_unpatching_between_the_passes_of_a_chunk(chunk):
    theirs = told(Generator(built(DeferringModel)))
    ours = told(Generator(patched(built(DeferringModel))), chunk)
    call, made = ours.call, []

    def unpatch_before_the_last_pass(x, start, **context):
        if len(made) == 2:
            unpatch(ours.model)
        made.append(start)
        return call(x, start, **context)

    ours.call = unpatch_before_the_last_pass
    assert_same(told(ours), theirs)


def test_the_next_video():
    def two_videos(model):
        generator = told(Generator(model), 6)
        for entry in generator.cache:  # the bank's indices stay: a first chunk does not look at it
            entry["local_end_index"].fill_(0)
            entry["global_end_index"].fill_(0)
        generator.position, generator.made = 0, []
        return told(generator, 7)

    assert_same(
        two_videos(patched(built(DeferringModel, top_k=2), top_k=2)), two_videos(built(DeferringModel, top_k=2))
    )


def test_inference_mode():
    theirs = told(Generator(built(DeferringModel, top_k=2)), 6, empty=True)
    with torch.inference_mode():
        ours = told(Generator(patched(built(DeferringModel, top_k=2), top_k=2)), 6, empty=True)
    assert_same(ours, theirs)


def test_whoever_is_innermost_says_whether_a_pass_stores():
    class Wrapper(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, *arguments, update_cache=False):
            return self.model(*arguments, update_cache=update_cache)

    wrapper = Wrapper(built(DeferringModel))
    names = patch(wrapper)
    assert names == ["model.blocks.0.self_attn", "model.blocks.1.self_attn"]
    cache, x = new_cache(2, 12), torch.zeros(1, CHUNK * TOKENS, DIM)
    ends = []
    with torch.no_grad():
        for call in (
            lambda: wrapper(x, cache, 0),
            lambda: wrapper(x, cache, 0, update_cache=True),
            lambda: wrapper(x, cache, 3 * TOKENS),
            lambda: wrapper.model(x, cache, 3 * TOKENS),
        ):
            call()
            ends.append(int(cache[1]["global_end_index"]) // TOKENS)
    assert ends == [0, 3, 3, 6]


# -- the caller's buffers ------------------------------------------------------------------------------------------


def live_bytes() -> int:
    gc.collect()
    tensors = (x for x in gc.get_objects() if type(x) in (torch.Tensor, nn.Parameter))
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


@pytest.mark.parametrize("top_k", [None, 2], ids=["dense", "activated"])
def test_no_copy_of_the_cache_is_made(top_k, monkeypatch):
    monkeypatch.setattr(attention, "JOIN_BELOW", 0)  # as for frames of any real size
    generator = told(Generator(built(DeferringModel, top_k=top_k)), 6)
    generator.outputs.clear()
    addresses = [entry[name].data_ptr() for entry in generator.cache for name in "kv"]
    cache_bytes = sum(entry[name].nbytes for entry in generator.cache for name in "kv")
    before = live_bytes()
    patch(generator.model, check=False, returns=caller.with_update)
    generator.chunk()
    generator.outputs.clear()
    generator.made.pop()
    # One mean key per frame, and small things like indices: no second cache.
    assert live_bytes() - before <= cache_bytes / TOKENS + 2000
    assert [entry[name].data_ptr() for entry in generator.cache for name in "kv"] == addresses
    with Traffic() as traffic:
        generator.chunk()
    per_frame = generator.cache[0]["k"].nbytes / 12
    assert max(written for _, written in traffic.written) <= 3.2 * 2 * per_frame, "more than the chunk's ffn at once"


def test_buffers_go_when_the_caller_drops_them():
    generator = told(Generator(patched(built(DeferringModel, top_k=2), top_k=2)), 2)
    before = live_bytes()
    generator.cache, generator.bank, generator.outputs, generator.made = [], [], [], []
    assert before - live_bytes() > 2 * 12 * TOKENS * DIM * 2 * 4


def test_contents_are_refused_while_they_are_overwritten():
    generator = told(Generator(patched(built(DeferringModel))), 6)
    x = torch.zeros(1, CHUNK * TOKENS, DIM)
    with torch.no_grad():
        generator.call(x, 18, update_cache=False)
        with pytest.raises(ValueError, match="chunk at frame 18 is being denoised and has taken the place of 3 frames"):
            contents(generator.cache[0])
        with pytest.raises(ValueError, match="at frame 18 was denoised and never stored, and a call at frame 21"):
            generator.call(x, 21)
        generator.call(x, 18)
    contents(generator.cache[0])


# -- what is refused -------------------------------------------------------------------------------------------------


def test_patch_names_what_it_cannot_serve():
    model = built(StoringModel)
    with pytest.raises(ValueError, match=r"memory: .* MemoryConfig.published\(...\), got MemoryConfig\("):
        patch(model, memory=MemoryConfig())
    with pytest.raises(ValueError, match="Linear has no self-attention of the causal Wan kind"):
        patch(nn.Linear(1, 1))
    attention = model.blocks[1].self_attn
    for attribute, value, complaint in (
        ("norm_k", nn.Identity(), "must be an RMS norm over all heads .* got Identity"),
        ("norm_k", None, "is missing"),
        ("norm_q", nn.LayerNorm(DIM), "must be an RMS norm"),
        ("norm_q", nn.RMSNorm(DIM // HEADS, eps=1e-6), "must be over all 48 channels, got 24"),
        ("norm_q", nn.RMSNorm(DIM, eps=1e-5), "eps 1e-06 differs from that of norm_q, 1e-05"),
        ("num_heads", 16, "heads of 3 channels"),
        ("o", None, "is missing"),
    ):
        kept = getattr(attention, attribute)
        setattr(attention, attribute, value)
        with pytest.raises(ValueError, match=rf"^blocks.1.self_attn.(num_heads|norm_k|{attribute}): .*{complaint}"):
            patch(model)
        setattr(attention, attribute, kept)
    assert not hasattr(model.blocks[0].self_attn, "_memflow_patch"), "half a model was patched"
    patch(model)
    with pytest.raises(ValueError, match="is patched already"):
        patch(model)


GRID_SIZES = torch.tensor([[3, 2, 3]])


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"kv_cache": None}, "kv_cache is None .* is not served"),
        ({"kv_cache": [1]}, "kv_cache must be a dictionary, got list"),
        ({"kv_cache": {"k": 0, "v": 0}}, r"kv_cache\['k'\] must be \[B, 12 frames \* 6 tokens, .* got int"),
        ({"kv_cache": {"k": 0, "v": 0, "local_end_index": 0}}, "kv_cache lacks global_end_index; it has k, v"),
        ({"kv_cache": new_cache(1, 12)[0] | {"pinned": 6}}, "kv_cache has pinned, which may change what is held"),
        ({"kv_cache": new_cache(1, 21)[0]}, r"kv_cache\['k'\] must be \[B, 12 frames \* 6 tokens, H, D\]"),
        ({"kv_cache": new_cache(1, 12, dtype=torch.bfloat16)[0]}, r"is torch.bfloat16 .* give torch.float32"),
        ({"kv_cache": new_cache(1, 12, batch=2)[0]}, r"is torch.float32 \[2, 72, 2, 24\]; .* batch 1"),
        ({"kv_cache": new_cache(1, 12, heads=1)[0]}, r"\[1, 72, 1, 24\]; .* 2 heads x 24"),
        ({"kv_bank": new_cache(1, 3)[0], "update_bank": True}, "kv_bank lacks k_new, v_new"),
        ({"kv_bank": new_cache(1, 4)[0]}, r"kv_bank\['k'\] must be \[B, 3 frames"),
        ({"grid_sizes": torch.tensor([[3, 2, 4]])}, r"x must be \[B, 3 \* 2 \* 4, C\] .* got \[1, 18, 48\]"),
        ({"grid_sizes": torch.tensor([[3, 2, 3], [2, 3, 3]])}, "for all batch rows"),
        ({"current_start": 5}, "current_start 5 must be a whole number of frames of 6 tokens"),
        ({"freqs": None}, r"freqs must be a complex table \[positions, 12\], got NoneType"),
        ({"freqs": torch.polar(torch.ones(4, 12), torch.ones(4, 12))}, "freqs is not the rotation of Wan 2.1"),
    ],
)
def test_a_call_names_what_it_cannot_serve(changes, complaint):
    model = built(StoringModel)
    patch(model, memory=MemoryConfig.published(record_interval=1), check=False, returns=caller.plain)
    arguments = {
        "x": torch.zeros(1, 3 * TOKENS, DIM),
        "seq_lens": torch.tensor([3 * TOKENS]),
        "grid_sizes": GRID_SIZES,
        "freqs": model.freqs,
        "block_mask": None,
        "kv_cache": new_cache(1, 12)[0],
        "current_start": 0,
    }
    with torch.no_grad(), pytest.raises(ValueError, match=rf"^blocks.0.self_attn.*{complaint}"):
        model.blocks[0].self_attn(**(arguments | changes))


def test_a_stream_cannot_go_back():
    generator = told(Generator(patched(built(StoringModel)), places=None), 6)
    with torch.no_grad(), pytest.raises(ValueError, match="holds frames up to 17; a stream cannot go back"):
        generator.call(torch.zeros(1, CHUNK * TOKENS, DIM), 9)


def test_an_argument_of_the_fork_that_is_not_known():
    class Fork(type(built(StoringModel).blocks[0].self_attn)):
        def forward(self, x, grid_sizes, freqs, kv_cache, current_start, window=None):
            raise NotImplementedError

    model = nn.ModuleList([Fork(DIM, HEADS, 3, None, True)])
    patch(model, check=False, returns=caller.plain)
    arguments = (torch.zeros(1, 3 * TOKENS, DIM), GRID_SIZES, built(StoringModel).freqs, new_cache(1, 12)[0], 0)
    with torch.no_grad():
        assert model[0](*arguments).shape == (1, 18, DIM)
        with pytest.raises(ValueError, match=r"^0\.forward: its argument window is not served, got 4"):
            model[0](*arguments, window=4)

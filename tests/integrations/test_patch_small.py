"""Small models on a CPU: few calls of torch, and the frames that larger ones choose."""

from __future__ import annotations

import gc
from collections import Counter

import pytest
import torch
from causal_wan import DeferringModel, Generator
from test_patch import assert_same, built, patched, told
from torch.autograd.forward_ad import dual_level, make_dual
from torch.utils._python_dispatch import TorchDispatchMode

from memflow.integrations import attention, caller, patch
from memflow.integrations.caller import Beside
from memflow_kernels import select_frames


@pytest.mark.parametrize("top_k", [None, 2], ids=["dense", "activated"])
@pytest.mark.parametrize("join_below", [0, 1 << 17], ids=["parts", "joined"])
def test_parts_and_joined_frames_give_the_same(top_k, join_below, monkeypatch):
    monkeypatch.setattr(attention, "JOIN_BELOW", join_below)
    theirs = told(Generator(built(DeferringModel, top_k=top_k), batch=2))
    assert_same(told(Generator(patched(built(DeferringModel, top_k=top_k), top_k=top_k), batch=2)), theirs)


@pytest.mark.parametrize("scores", ["random", "equal", "nan", "infinite"])
@pytest.mark.parametrize(("frames", "top_k"), [(6, 3), (5, 1), (4, 4)])
def test_what_is_shown_is_what_select_frames_chooses(scores, frames, top_k):
    noise = torch.Generator().manual_seed(frames)
    query_mean, means = (torch.randn(shape, generator=noise) for shape in ([2, 3, 8], [2, frames, 3, 8]))
    if scores == "equal":
        means[:] = means[:, :1]
    elif scores != "random":
        means[1, 2, 0, 0] = torch.nan if scores == "nan" else torch.inf
    shown = attention._shown(query_mean, means, top_k, frames + 2, 5, torch.float32)
    assert shown.shape == (2, 3, 1, (frames + 2) * 5) and set(shown.unique().tolist()) <= {0.0, -torch.inf}
    by_frame = shown.unflatten(-1, (frames + 2, 5)).squeeze(2) == 0
    assert (by_frame == by_frame[..., :1]).all() and by_frame[:, :, frames:].all()
    found = by_frame[:, :, :frames, 0]
    assert torch.equal(found.nonzero()[:, 2].view(2, 3, top_k).int(), select_frames(query_mean[:, None], means, top_k))


MEANS = Counter({"memflow::frame_means_unrecorded": 1})  # of a bank that has moved since the call before


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[func.name()] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("top_k", "most"), [(None, 36), (2, 48)], ids=["dense", "activated"])
def test_a_call_makes_few_calls_of_torch(top_k, most):
    """A tiny model's time is the host's: what its own code takes is what ours has to stay under."""
    generator = told(Generator(patched(built(DeferringModel, top_k=top_k), top_k=top_k)), 10)
    layer, taken = generator.model.blocks[0].self_attn, []
    forward = layer.forward

    def counted(*args, **kwargs):
        with Calls() as calls:
            out = forward(*args, **kwargs)
        taken.append(calls.names)
        return out

    layer.forward = counted
    generator.chunk()
    for names in taken:
        ours = Counter({name: count for name, count in names.items() if name.startswith("memflow::")})
        assert ours - MEANS == Counter({"memflow::qk_norm_rope_write": 1})
        assert names.total() <= most, names


def test_what_is_kept_beside_a_tensor_goes_with_it():
    beside, x = Beside(), torch.zeros(2)
    assert beside.get(x) is None and beside.pop(x) is None
    assert beside.set(x, "a") == "a" and beside.get(x) == "a" and beside.get(x.clone()) is None
    assert beside.set(x, "b") == "b" and beside.pop(x) == "b" and beside.get(x) is None
    beside.set(x, "c")
    del x
    gc.collect()
    assert not beside.known


def streaming(monkeypatch) -> tuple[Generator, list]:
    """A generator in the middle of its stream, and what goes through the checks of the op from now on."""
    model, checked, own = built(DeferringModel), [], attention.qk_norm_rope_write
    patch(model, check=False, returns=caller.with_update)
    generator = told(Generator(model, places=None), 8)

    def seen(*args, **kwargs):
        checked.append(1)
        return own(*args, **kwargs)

    monkeypatch.setattr(attention, "qk_norm_rope_write", seen)
    generator.chunk()
    assert not checked
    return generator, checked


def call(generator: Generator, x: torch.Tensor) -> torch.Tensor:
    """What the first self-attention alone gives."""
    arguments = {"seq_lens": None, "grid_sizes": torch.tensor([[3, 2, 3]]), "freqs": generator.model.freqs}
    arguments |= {"kv_cache": generator.cache[0], "current_start": generator.position * 18, "block_mask": None}
    out = generator.model.blocks[0].self_attn(x, **arguments)
    return out[0] if isinstance(out, tuple) else out


def test_what_was_checked_once_is_not_checked_again_unless_it_changes(monkeypatch):
    generator, checked = streaming(monkeypatch)
    generator.cache[0]["v"] = generator.cache[0]["v"].clone()
    generator.chunk()
    assert len(checked) == 1
    norm = generator.model.blocks[1].self_attn.norm_q
    norm.weight = torch.nn.Parameter(norm.weight.data.clone(), requires_grad=False)
    generator.chunk()
    assert len(checked) == 2


class Doubled(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x).double()


@pytest.mark.parametrize("change", ["values", "model", "k", "v"])
def test_what_changes_for_the_worse_is_refused(change, monkeypatch):
    generator, _ = streaming(monkeypatch)
    x = torch.zeros(1, 18, 48)
    if change == "values":
        generator.cache[0]["v"] = generator.cache[0]["v"].double()
    elif change == "model":
        generator.model.blocks[0].self_attn.double()
        x = x.double()
    else:
        layer = generator.model.blocks[0].self_attn
        setattr(layer, change, Doubled(getattr(layer, change)))
    with torch.no_grad(), pytest.raises(ValueError, match=r"^blocks\.0\.self_attn: kv_cache\['k'\] is torch.float32"):
        call(generator, x)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_values_of_frames_that_nobody_chose_do_not_count(wrong, monkeypatch):
    """A mask alone does not keep them out: nothing times infinity is no number."""
    model = built(DeferringModel, top_k=1)
    patch(model, check=False, returns=caller.with_update)  # the check would compare what is no number
    generator = told(Generator(model, places=None), 8)
    masks, shown = [], attention._shown
    monkeypatch.setattr(attention, "_shown", lambda *arguments: masks.append(shown(*arguments)) or masks[-1])
    x = torch.randn(1, 18, 48, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = call(generator, x)
        hidden = masks[0].isinf().all(1).view(-1, 6).all(1).nonzero().flatten().tolist()
        assert hidden
        for frame in hidden:
            generator.cache[0]["v"][:, 6 * frame : 6 * frame + 6] = wrong
        torch.testing.assert_close(call(generator, x), expected)
    assert expected.isfinite().all()


def test_tangents_are_refused(monkeypatch):
    generator, _ = streaming(monkeypatch)
    x = torch.ones(1, 18, 48)
    with torch.no_grad(), dual_level(), pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        call(generator, make_dual(x, x))

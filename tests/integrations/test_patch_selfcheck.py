"""The self-check of patch(): forks that compute something else are refused in their first calls, plain ones never are,
and a fault in our own path does not pass."""

from __future__ import annotations

import pytest
import torch
from causal_wan import CHUNK, DIM, TOKENS, DeferringModel, Generator, SelfAttention, StoringModel

from memflow.integrations import attention as path
from memflow.integrations import cache as slots
from memflow.integrations import patch, unpatch
from memflow_kernels.reference.rotary import rotate_3d


class ByDistance(SelfAttention):
    """Keys are kept as they are and turned by their place in the cache."""

    def turn(self, x, grid, start):
        return x

    def softmax(self, query, keys, values, bias):
        stop = keys.shape[1] // TOKENS
        place = stop - query.shape[1] // TOKENS
        turned = rotate_3d(keys.double(), (2, 3), 0).type_as(keys)
        return super().softmax(rotate_3d(query.double(), (2, 3), place).type_as(query), turned, values, bias)


class BiasByAge(SelfAttention):
    def logits_bias(self, frames, new, tokens):
        age = torch.arange(frames).flip(0).clamp(min=new - 1) - (new - 1)
        return (-0.1 * age).repeat_interleave(tokens)[None, None, None]


class Temperature(SelfAttention):
    def softmax(self, query, keys, values, bias):
        return super().softmax(query * 0.9, keys, values, bias)


class ValuesTurned(SelfAttention):
    def stored_value(self, value, grid, start):
        return self.turn(value, grid, start)


class AveragedSink(SelfAttention):
    def evicted(self, kv_cache, tokens, gone):
        sink = self.sink_size * tokens
        for name in "kv":
            gone_frames = kv_cache[name][:, sink : sink + gone * tokens]
            kv_cache[name][:, :sink] = 0.9 * kv_cache[name][:, :sink] + 0.1 * gone_frames[:, :sink]


class NoSink(SelfAttention):
    """It says that it has a sink, and rolls it away with the rest."""

    def evicted(self, kv_cache, tokens, gone):
        sink = self.sink_size * tokens
        for name in "kv":
            kv_cache[name][:, : sink + gone * tokens] = kv_cache[name][:, : sink + gone * tokens].roll(1, 1)


class UnturnedKeys(SelfAttention):
    def stored_key(self, key, turned):
        return key


TWISTS = [ByDistance, BiasByAge, Temperature, ValuesTurned, AveragedSink, NoSink, UnturnedKeys]


def built(kind, **sizes):
    torch.manual_seed(0)
    return kind(**sizes).eval()


def told(generator, chunks, switches=()):
    for chunk in range(generator.position, chunks):
        if chunk in switches:
            generator.switch()
        generator.chunk()
    return generator


@pytest.mark.parametrize("kind", [StoringModel, DeferringModel])
@pytest.mark.parametrize("twist", TWISTS, ids=lambda twist: twist.__name__)
def test_a_twist_is_refused(twist, kind):
    model = built(kind, attention=twist)
    patch(model)
    generator = Generator(model, places=None)
    with pytest.raises(ValueError, match=r"^blocks.0.self_attn: its own code .* This fork is not served"):
        told(generator, 5)
    needed = 4 if twist in (AveragedSink, NoSink) else 1
    assert generator.position <= needed, "found later than where it first makes a difference"
    unpatch(model)


@pytest.mark.parametrize("twist", TWISTS, ids=lambda twist: twist.__name__)
def test_the_twists_make_a_difference(twist):
    plain, twisted = (
        told(Generator(built(StoringModel, attention=kind), places=None), 6) for kind in (SelfAttention, twist)
    )
    errors = [((a - b).norm() / b.norm()).item() for a, b in zip(twisted.outputs, plain.outputs, strict=True)]
    assert max(errors) > 1e-3


PLAIN = [
    {},
    {"batch": 2},
    {"places": None},
    {"places": None, "top_k": 2},
    {"top_k": 2},
    {"top_k": 1, "batch": 2},
    {"sink": 0},
    {"sink": 1, "places": None},
    {"sink": 2, "top_k": 3},
    {"dtype": torch.float64},
]


@pytest.mark.parametrize("variant", PLAIN, ids=str)
@pytest.mark.parametrize("kind", [StoringModel, DeferringModel])
def test_no_false_alarm(kind, variant):
    dtype = variant.get("dtype", torch.float32)
    model = built(kind, **{name: variant[name] for name in ("sink", "top_k") if name in variant}).to(dtype)
    patch(model)
    sizes = {name: variant[name] for name in ("batch", "places") if name in variant}
    generator = Generator(model, **sizes)
    for entries in (*generator.cache, *(generator.bank or [])):
        for name in entries.keys() & {"k", "v", "k_new", "v_new"}:
            entries[name] = entries[name].to(dtype)
    call = generator.call
    generator.call = lambda x, *args, **kwargs: call(x.to(dtype), *args, **kwargs)
    told(generator, 7, switches=(5,) if kind is DeferringModel else ())
    for entries in (*generator.cache, *(generator.bank or [])):  # another video in the same buffers
        for name in ("global_end_index", "local_end_index"):
            entries[name].zero_()
    generator.position, generator.made = 0, []
    told(generator, 3)


def test_bfloat16_gives_no_false_alarm():
    model = built(StoringModel).bfloat16()
    patch(model)
    generator = Generator(model, places=None)
    for entries in generator.cache:
        for name in "kv":
            entries[name] = entries[name].bfloat16()
    call = generator.call
    generator.call = lambda x, *args, **kwargs: call(x.bfloat16(), *args, **kwargs)
    told(generator, 7)


def test_after_the_check_nothing_of_it_runs():
    calls = []

    class Counting(SelfAttention):
        def softmax(self, *states):
            calls.append(1)
            return super().softmax(*states)

    model = built(StoringModel, attention=Counting)
    patch(model, check_calls=1)
    generator = told(Generator(model, places=None), 9)
    counted = len(calls)
    assert counted
    told(generator, 12)
    assert len(calls) == counted
    assert not any(block.self_attn._memflow_patch.check.given_up for block in model.blocks)


# -- faults in our own path ------------------------------------------------------------------------------------------


def _step_with(change):
    def fault(monkeypatch):
        own = slots.FrameCache.step
        monkeypatch.setattr(slots.FrameCache, "step", lambda self, *args: change(own(self, *args)))

    return fault


def _slots(change):
    return _step_with(lambda step: step._replace(slots=torch.tensor(change(step.places), dtype=torch.int32)))


def _write_with(change):
    def fault(monkeypatch):
        own = path.qk_norm_rope_write
        monkeypatch.setattr(path, "qk_norm_rope_write", lambda *args, **kwargs: own(*args, **change(kwargs)))

    return fault


def _frames_with(change):
    def fault(monkeypatch):
        own = path._frames
        monkeypatch.setattr(path, "_frames", lambda entries, *rest: own(entries, *change(*rest)))

    return fault


def _scaled_attention(monkeypatch):
    own = path._attention_over
    monkeypatch.setattr(path, "_attention_over", lambda parts, query, *rest: own(parts, 1.2 * query, *rest))


def _no_last_store(monkeypatch):
    monkeypatch.setattr(slots.Mirror, "write", lambda *_: None)


FAULTS = {
    "wrong slots": _slots(lambda places: places[::-1]),
    "one slot too far": _slots(lambda places: [(place + 1) % 12 for place in places]),
    "a frame is not written": _slots(lambda places: [*places[:-1], -1]),
    "nothing is written once the cache rolls": _step_with(
        lambda step: step._replace(slots=torch.full_like(step.slots, -1)) if step.overwritten else step
    ),
    "wrong start frame": _step_with(lambda step: step._replace(start=step.start + 1)),
    "start frame of the slot": _step_with(lambda step: step._replace(start=max(0, step.places[0]))),
    "wrong eps": _write_with(lambda kwargs: kwargs | {"eps": 0.01}),
    "norms exchanged": _write_with(
        lambda kwargs: kwargs | {"weight_q": kwargs["weight_k"], "weight_k": kwargs["weight_q"]}
    ),
    "the newest frame is not seen": _frames_with(lambda first, stop, tokens: (first, max(1, stop - 1), tokens)),
    "the oldest frame is not seen": _frames_with(
        lambda first, stop, tokens: (first + 1 if stop == 12 else first, stop, tokens)
    ),
    "another scale": _scaled_attention,
    "indices are not set": _no_last_store,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_ours_is_found(fault, monkeypatch):
    FAULTS[fault](monkeypatch)
    model = built(StoringModel)
    patch(model)
    with pytest.raises(ValueError, match=r"^blocks\.\d\.self_attn: its own code gives"):
        told(Generator(model, places=None), 7)


def test_options_that_make_no_sense():
    model = built(StoringModel)
    for name, value in (("check", 1), ("check_calls", 0), ("check_calls", True), ("check_tolerance", 0.0)):
        with pytest.raises(ValueError, match=f"^{name} must be .* got"):
            patch(model, **{name: value})
    patch(model)
    x = torch.zeros(1, CHUNK * TOKENS, DIM)
    with pytest.raises(ValueError, match="gradients are asked for, and a patched model writes into its cache in place"):
        model(x, Generator(model).cache, 0)

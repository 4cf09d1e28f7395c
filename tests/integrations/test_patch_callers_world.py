"""A patched attention in the caller's world: as its own code does there, or a refusal."""

from __future__ import annotations

import pytest
import torch
from causal_wan import DeferringModel, Generator, StoringModel
from worlds import WORLDS

from memflow.integrations import patch, unpatch


def told(kind, top_k, world, patching, dtype=torch.float32) -> list[torch.Tensor]:
    """Outputs of eight chunks and a switch; the attention layers alone run inside"""
    torch.manual_seed(0)
    model = kind(top_k=top_k).eval()
    if patching is not None:
        patch(model, check=patching)
    for block in model.blocks:
        attention, forward = block.self_attn, block.self_attn.forward

        def inside(*args, forward=forward, **kwargs):
            with world():
                return forward(*args, **kwargs)

        attention.forward = inside
    generator = Generator(model)
    for buffers in (*generator.cache, *generator.bank):
        buffers |= {name: buffer.to(dtype) for name, buffer in buffers.items() if buffer.is_floating_point()}
    for chunk in range(8):
        if chunk == 5:
            generator.switch()
        generator.chunk()
    for block in model.blocks:
        block.self_attn.forward = block.self_attn.forward.__kwdefaults__["forward"]
    if patching is not None:
        unpatch(model)
    return [output.clone() for output in generator.outputs]


OUTSIDE = {}


@pytest.mark.parametrize("top_k", [None, 2], ids=["dense", "activated"])
@pytest.mark.parametrize("kind", [StoringModel, DeferringModel])
@pytest.mark.parametrize("name", sorted(set(WORLDS) - {"autocast", "several at once", "gradients"}))
def test_the_same_outputs(name, kind, top_k):
    if (kind, top_k) not in OUTSIDE:
        OUTSIDE[kind, top_k] = told(kind, top_k, WORLDS["no gradients"], None)
    for check in (False, True):
        ours = told(kind, top_k, WORLDS[name], check)
        for a, b in zip(ours, OUTSIDE[kind, top_k], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("top_k", [None, 2], ids=["dense", "activated"])
def test_autocast_as_its_own_code(top_k):
    """With the cache in the dtype that autocast computes in, as the public inference scripts have it."""
    expected = told(StoringModel, top_k, WORLDS["autocast"], None, torch.bfloat16)
    for check in (False, True):
        for a, b in zip(told(StoringModel, top_k, WORLDS["autocast"], check, torch.bfloat16), expected, strict=True):
            assert (a - b).norm() <= 1e-2 * b.norm()


def test_autocast_over_a_cache_of_another_dtype_is_refused():
    with pytest.raises(ValueError, match=r"kv_cache\['k'\] is torch.float32 .*; q, k and v of this call give torch.bf"):
        told(StoringModel, None, WORLDS["autocast"], False)


def test_gradients_are_refused():
    with pytest.raises(ValueError, match="gradients"):
        told(StoringModel, None, WORLDS["gradients"], False)

"""patch(retrieval=True): our update of a published model's bank in place of its own."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from causal_wan import DIM, HEADS, TOKENS, DeferringModel, Generator, StoringModel, new_bank
from test_patch_selfcheck import built, told

from memflow.integrations import patch, unpatch
from memflow.integrations.bank import BankUpdate


class UpdatingModel(DeferringModel):
    """It updates a bank as the published model does, from the text keys of its layers."""

    def _apply_cache_updates_before(self, kv_bank, crossattn_cache):
        for bank, text in zip(kv_bank, crossattn_cache, strict=True):
            recorded, places = int(bank["local_end_index"]) // TOKENS, bank["k"].shape[1] // TOKENS
            if not recorded:
                continue
            if recorded > places:
                logits = torch.einsum("bthd,bshd->bhts", text["k"], bank["k"])
                scores = logits.mean((1, 2)).unflatten(1, (places, TOKENS)).mean(2)
                kept = scores.topk(places - 1, dim=1).indices
                for name in "kv":
                    frames = bank[name].unflatten(1, (places, TOKENS))
                    rows = torch.arange(len(frames))[:, None]
                    frames[:, :-1] = frames[rows, kept]
            place = (min(recorded, places) - 1) * TOKENS
            for name in "kv":
                bank[name][:, place : place + TOKENS] = bank[f"{name}_new"]


def updating(model, batch: int = 2):
    generator = Generator(model, batch=batch)
    noise = torch.Generator().manual_seed(1)
    text = [{"k": torch.randn(batch, 5, HEADS, DIM // HEADS, generator=noise)} for _ in model.blocks]
    generator.maintain = lambda: model._apply_cache_updates_before(generator.bank, text)
    return generator


def test_our_update_of_the_bank_is_theirs():
    theirs = told(updating(built(UpdatingModel)), 10)
    model = built(UpdatingModel)
    patch(model, retrieval=True)
    assert isinstance(model._apply_cache_updates_before, BankUpdate)
    ours = told(updating(model), 10)
    for a, b in zip(ours.outputs, theirs.outputs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    for a, b in zip(ours.bank, theirs.bank, strict=True):
        for name in "kv":
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-5)
    unpatch(model)
    assert "_apply_cache_updates_before" not in vars(model)


def test_another_update_of_the_bank_is_refused(monkeypatch):
    class Newest(UpdatingModel):
        def _apply_cache_updates_before(self, kv_bank, crossattn_cache):
            super()._apply_cache_updates_before(kv_bank, [{"k": -text["k"]} for text in crossattn_cache])

    model = Newest().eval()
    patch(model, retrieval=True)
    with pytest.raises(ValueError, match="leaves other frames in the bank of layer"):
        told(updating(model), 10)
    with pytest.raises(ValueError, match="retrieval: StoringModel has no module with _apply_cache_updates_before"):
        patch(built(StoringModel), retrieval=True)


class Turned(UpdatingModel):
    """It keeps the frames that the prompt calls for least."""

    def _apply_cache_updates_before(self, kv_bank, crossattn_cache):
        super()._apply_cache_updates_before(kv_bank, [{"k": -text["k"]} for text in crossattn_cache])


def full_bank(seed: int, dtype: torch.dtype) -> tuple[list[dict], list[dict]]:
    noise = torch.Generator().manual_seed(seed)
    (bank,) = new_bank(1, 4, 2)
    bank |= {name: torch.randn(bank[name].shape, generator=noise).to(dtype) for name in ("k", "v", "k_new", "v_new")}
    bank["local_end_index"].fill_(9 * TOKENS)
    return [bank], [{"k": torch.randn(2, 5, HEADS, DIM // HEADS, generator=noise).to(dtype)}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_check_tells_another_update_in_every_dtype(dtype):
    for seed in range(20):
        bank, text = full_bank(seed, dtype)
        BankUpdate("model", UpdatingModel(), 1)(bank, text)  # no false alarm
        bank, text = full_bank(seed, dtype)
        with pytest.raises(ValueError, match="leaves other frames in the bank of layer 0"):
            BankUpdate("model", Turned(), 1)(bank, text)


def test_frames_that_rounding_exchanges_are_no_fault():
    bank, text = full_bank(0, torch.bfloat16)
    tokens = bank[0]["k"].unflatten(1, (4, -1))
    tokens[:, 1] = tokens[:, 0]  # as relevant as each other

    class Exchanging(UpdatingModel):
        def _apply_cache_updates_before(self, kv_bank, crossattn_cache):
            frames = kv_bank[0]["v"].unflatten(1, (4, -1))
            frames[:, :2] = frames[:, :2].flip(1)
            super()._apply_cache_updates_before(kv_bank, crossattn_cache)

    BankUpdate("model", Exchanging(), 1)(bank, text)


def test_the_bank_belongs_to_the_caller():
    bank, text = full_bank(0, torch.float32)
    update, key = BankUpdate("model", UpdatingModel(), 0), weakref.ref(bank[0]["k"])
    update(bank, text)
    del bank
    gc.collect()
    assert key() is None, "a video's bank is in memory as long as the model is patched"

"""The update of a published model's bank in place of its own: the same frames, without attention over all of them.

The published code scores the frames of a full bank by the mean over text tokens, heads and frame tokens of
<text key, frame key>, keeps the best in the order of their scores, and puts the pending prototype behind them. The
score is linear in both keys, so that mean keys suffice.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from memflow.integrations.mirror import version
from memflow_kernels import frame_means, prompt_relevance

UPDATE = "_apply_cache_updates_before"  # of the published model, called before a chunk


class BankUpdate:
    """One model with our update of its bank in place of its own. checked: how many updates run the model's own beside
    ours, on a copy; both must leave the same bank."""

    def __init__(self, name: str, module: nn.Module, checked: int):
        self.name, self.module, self.left = name, module, checked
        self.own = getattr(module, UPDATE)
        self.set_on_object = UPDATE in vars(module)
        self.means: dict[int, tuple[Tensor, int | None, Tensor]] = {}
        setattr(module, UPDATE, self)
        module._memflow_bank_update = self

    def remove(self) -> None:
        if self.set_on_object:
            setattr(self.module, UPDATE, self.own)
        else:
            delattr(self.module, UPDATE)
        del self.module._memflow_bank_update

    @torch.no_grad()
    def __call__(self, kv_bank: list[dict], crossattn_cache: list[dict], *args, **kwargs) -> None:
        own = None
        if self.left:
            own = [{name: _copied(entry) for name, entry in bank.items()} for bank in kv_bank]
            self.own(own, crossattn_cache, *args, **kwargs)
        for index, (bank, text) in enumerate(zip(kv_bank, crossattn_cache, strict=True)):
            self._update(index, bank, text)
        if own is not None:
            self._compare(kv_bank, own)
            self.left -= any(int(bank["local_end_index"]) > bank["k"].shape[1] for bank in kv_bank)

    def _update(self, index: int, bank: dict, text: dict) -> None:
        tokens, length = bank["k_new"].shape[1], bank["k"].shape[1]
        recorded = int(bank["local_end_index"])
        if recorded < tokens:
            return
        if recorded <= length:
            for name in ("k", "v"):
                bank[name][:, recorded - tokens : recorded] = bank[f"{name}_new"]
            return
        means = self._means(index, bank["k"], tokens)
        scores = prompt_relevance(text["k"], frame_mean=means)
        kept = scores.topk(scores.shape[1] - 1, dim=1).indices  # [B, places - 1]
        rows = torch.arange(kept.shape[0], device=kept.device)[:, None]
        for name in ("k", "v"):
            frames = bank[name].unflatten(1, (-1, tokens))
            frames[:, :-1] = frames[rows, kept]
            frames[:, -1] = bank[f"{name}_new"]
        new = torch.cat([means[rows, kept], frame_means(bank["k_new"], tokens)], dim=1)
        self.means[index] = bank["k"], version(bank["k"]), new

    def _means(self, index: int, key: Tensor, tokens: int) -> Tensor:
        """[B, places, H, D], computed again where anybody has written into the bank since."""
        known = self.means.get(index)
        if known is not None and known[0] is key and known[1] is not None and known[1] == version(key):
            return known[2]
        return frame_means(key, tokens)

    def _compare(self, kv_bank: list[dict], own: list[dict]) -> None:
        for index, (ours, theirs) in enumerate(zip(kv_bank, own, strict=True)):
            for name in ("k", "v"):
                if not torch.equal(ours[name], theirs[name]) and not self._is_close(ours):
                    raise ValueError(
                        f"{self.name}.{UPDATE}: its own code leaves other frames in the bank of layer {index} (entry "
                        f"{name!r}). Its update is not the published one: patch with retrieval=False"
                    )

    def _is_close(self, bank: dict) -> bool:
        """16-bit scores may be rounded into another order."""
        return bank["k"].dtype in (torch.bfloat16, torch.float16)


def bank_updates(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that update a bank of their own, by name; ValueError where there is none."""
    found = {name or type(module).__name__: module for name, module in model.named_modules() if _updates(module)}
    if not found:
        raise ValueError(
            f"retrieval: {type(model).__name__} has no module with {UPDATE}(kv_bank, crossattn_cache), which updates a "
            "bank before a chunk; leave retrieval=False"
        )
    return found


def _updates(module: nn.Module) -> bool:
    update = getattr(type(module), UPDATE, None) or vars(module).get(UPDATE)
    return update is not None and {"kv_bank", "crossattn_cache"} <= set(inspect.signature(update).parameters)


def _copied(entry):
    return entry.clone() if isinstance(entry, Tensor) else entry

"""A caller's bank, read where it is: past frames that the caller's own code chooses and keeps in order; and our update
of it in place of the model's own (`patch(retrieval=True)`).

The caller keeps the dictionary {"k", "v": [B, places * N, H, D], "k_new", "v_new": [B, N, H, D], "global_end_index",
"local_end_index"}: the pending prototype lies in "k_new" and "v_new", indices are in tokens and count the prototypes
recorded so far. Choosing who stays runs between the calls. The published code scores the frames of a full bank by the
mean over text tokens, heads and frame tokens of <text key, frame key>, keeps the best in the order of their scores, and
puts the pending prototype behind them. The score is linear in both keys, so that mean keys suffice.
"""

from __future__ import annotations

import inspect
import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from memflow.integrations.cache import GLOBAL, LOCAL
from memflow.integrations.caller import CLOSE, HALF, Beside, Mirror, copied, version
from memflow_kernels import frame_means, prompt_relevance

if TYPE_CHECKING:
    from memflow.integrations.settings import Settings

UPDATE = "_apply_cache_updates_before"  # of the published model, called before a chunk
_KNOWN: Beside[FrameBank] = Beside()  # by key buffer


class FrameBank:
    """What is known of one layer's bank besides its frames."""

    def __init__(self, tokens: int):
        self.tokens = tokens
        self.global_end, self.local_end = Mirror(GLOBAL), Mirror(LOCAL)
        self.means: tuple[int | None, Tensor] | None = None

    @classmethod
    def of(cls, kv_bank: dict, tokens: int) -> FrameBank:
        """The state of a caller's bank."""
        bank = _KNOWN.get(kv_bank["k"])
        if bank is None or bank.tokens != tokens:
            bank = _KNOWN.set(kv_bank["k"], cls(tokens))
        return bank

    def ends(self, kv_bank: dict, stop: int, settings: Settings) -> tuple[int, int]:
        """Its indices in frames once a call that ends before frame `stop` has been stored: prototypes are counted as
        one per `record_interval` chunks since the beginning of the video."""
        recorded = (stop // settings.chunk - 1) // settings.record_interval + 1
        before = self.local_end.read(kv_bank) - self.global_end.read(kv_bank)
        return recorded, before // self.tokens + recorded

    def visible(self, kv_bank: dict, start: int, stop: int, settings: Settings, is_recache: bool) -> int:
        """Frames that attention sees in a call from `start` to `stop`: those recorded before it."""
        _, recorded = self.ends(kv_bank, stop, settings)
        if not is_recache and start // settings.chunk % settings.record_interval == 0:
            recorded -= 1  # its own prototype
        return max(0, min(recorded, kv_bank["k"].shape[1] // self.tokens))

    def frame_means(self, kv_bank: dict, frames: int) -> Tensor:
        """[B, frames, H, D]: mean keys, computed again when the caller has written into the bank."""
        key = kv_bank["k"]
        count = version(key)
        if self.means is None or count is None or self.means[0] != count or self.means[1].shape[1] != frames:
            self.means = count, frame_means(key[:, : frames * self.tokens], self.tokens)
        return self.means[1]

    def record(self, kv_bank: dict, key: Tensor, value: Tensor) -> None:
        """Make `key` and `value` [B, N, H, D] the pending prototype."""
        kv_bank["k_new"].copy_(key)
        kv_bank["v_new"].copy_(value)

    def count(self, kv_bank: dict, ends: tuple[int, int]) -> None:
        """Set its indices, in frames."""
        self.global_end.write(kv_bank, ends[0] * self.tokens)
        self.local_end.write(kv_bank, ends[1] * self.tokens)


class BankUpdate:
    """One model with our update of its bank in place of its own. checked: how many updates run the model's own beside
    ours, on a copy; both must leave the same bank."""

    def __init__(self, name: str, module: nn.Module, checked: int):
        self.name, self.module, self.left = name, module, checked
        self.own = getattr(module, UPDATE)
        self.set_on_object = UPDATE in vars(module)
        self.means: dict[int, tuple[weakref.ref, int | None, Tensor]] = {}
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
            own = [{name: copied(entry) for name, entry in bank.items()} for bank in kv_bank]
            self.own(own, crossattn_cache, *args, **kwargs)
        scores = [self._update(index, *layer) for index, layer in enumerate(zip(kv_bank, crossattn_cache, strict=True))]
        if own is not None:
            self._compare(kv_bank, own, scores)
            self.left -= any(int(bank["local_end_index"]) > bank["k"].shape[1] for bank in kv_bank)

    def _update(self, index: int, bank: dict, text: dict) -> Tensor | None:
        """The scores [B, places] by which frames were kept, where some had to go."""
        tokens, length = bank["k_new"].shape[1], bank["k"].shape[1]
        recorded = int(bank["local_end_index"])
        if recorded < tokens:
            return None
        if recorded <= length:
            for name in ("k", "v"):
                bank[name][:, recorded - tokens : recorded] = bank[f"{name}_new"]
            return None
        means = self._means(index, bank["k"], tokens)
        scores = prompt_relevance(text["k"], frame_mean=means)
        kept = scores.topk(scores.shape[1] - 1, dim=1).indices  # [B, places - 1]
        rows = torch.arange(kept.shape[0], device=kept.device)[:, None]
        for name in ("k", "v"):
            frames = bank[name].unflatten(1, (-1, tokens))
            frames[:, :-1] = frames[rows, kept]
            frames[:, -1] = bank[f"{name}_new"]
        new = torch.cat([means[rows, kept], frame_means(bank["k_new"], tokens)], dim=1)
        self.means[index] = weakref.ref(bank["k"]), version(bank["k"]), new
        return scores

    def _means(self, index: int, key: Tensor, tokens: int) -> Tensor:
        """[B, places, H, D], computed again where anybody has written into the bank since."""
        known = self.means.get(index)
        if known is not None and known[0]() is key and known[1] is not None and known[1] == version(key):
            return known[2]
        return frame_means(key, tokens)

    def _compare(self, kv_bank: list[dict], own: list[dict], scores: list[Tensor | None]) -> None:
        for index, (ours, theirs, score) in enumerate(zip(kv_bank, own, scores, strict=True)):
            for name in ("k", "v"):
                if not torch.equal(ours[name], theirs[name]) and not _is_close(ours[name], theirs[name], score):
                    raise ValueError(
                        f"{self.name}.{UPDATE}: its own code leaves other frames in the bank of layer {index} (entry "
                        f"{name!r}). Its update is not the published one: patch with retrieval=False"
                    )


def _is_close(ours: Tensor, theirs: Tensor, score: Tensor | None) -> bool:
    """Whether scores in 16-bit numbers, rounded, may put frames into the places that differ in another order."""
    if score is None or ours.dtype not in HALF:
        return False
    places = score.shape[1]
    differs = (ours != theirs).unflatten(1, (places, -1)).flatten(2).any(2)[:, :-1]  # the last one is the newcomer
    ranked = score.sort(1, descending=True).values
    near = ranked[:, :-1] - ranked[:, 1:] < CLOSE * ranked.abs().amax(1, keepdim=True)  # of a place and the next
    may = near | torch.nn.functional.pad(near, (1, 0))[:, :-1]
    newcomer = (ours != theirs).unflatten(1, (places, -1))[:, -1].any()
    return not newcomer and not (differs & ~may).any()


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

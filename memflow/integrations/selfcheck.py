"""The self-check of `patch`: in the first calls the module's own code runs beside ours, and both must agree.

Forks of the published generators share their attributes and signatures and differ in what they compute: positions by
distance, another sink, a bias. Nothing tells that from outside but their own result. So a call of a kind that has not
been seen before (the cache empty, half full, rolling for the first, second, third time; a denoising pass, the pass that
stores; frames encoded again; with a bank, ...) first runs the module's own forward on a copy of what it would have
found.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from memflow.integrations.attention import CallerAttention, Planned
from memflow.integrations.cache import INDICES, Held
from memflow.integrations.caller import CLOSE, HALF, copied

ROLLS_CHECKED = 3  # how often a cache must have rolled before another roll is nothing new


class Expected(NamedTuple):
    """What the module's own code made of a call. result: its return value. frames: their numbers, in the order in
    which it found them. kv_cache, kv_bank: its copies of the dictionaries, as it left them. was, was_bank: what it
    found in them. indices: its two indices before the call."""

    result: object
    frames: tuple[int, ...]
    kv_cache: dict
    kv_bank: dict | None
    was: dict[str, Tensor]
    was_bank: dict
    indices: tuple[int, ...]


class SelfCheck:
    """Of one self-attention.

    name: of the module, for errors. own: its own forward. calls: how many of every kind are checked, 0 = none.
    tolerance: the greatest difference, relative to the norm of what the module's own code gives; None = 1e-4 where both
    compute in float32 or wider on a CPU, 1e-2 elsewhere, as attention on a GPU may round to 16 bits inside.
    """

    def __init__(self, name: str, module: nn.Module, own: Callable, calls: int, tolerance: float | None):
        self.name, self.module, self.own, self.calls, self.tolerance = name, module, own, calls, tolerance
        self.seen: Counter = Counter()
        self.rolled = 0
        self.begun: Held | None = None  # what was held when the chunk in hand began
        self.given_up: dict[int, tuple[Tensor, Tensor]] = {}  # its frames that this chunk has overwritten

    def due(self, planned: Planned) -> tuple | None:
        """The kind of a call if it is to be checked."""
        call, step = planned.call, planned.step
        kind = (
            min(self.rolled, ROLLS_CHECKED) if step.kind[0] < 0 else 0,
            step.kind,
            planned.stored,
            call.is_recache,
            call.over_sink,
            call.unusual,
            planned.seen,
            call.update_bank,
            planned.settings,
            call.x.shape,
            call.x.dtype,
        )
        if step.overwritten and (planned.stored or planned.cache.held.unstored is None):
            self.rolled += 1
        return kind if self.seen[kind] < self.calls else None

    def run_own(self, planned: Planned) -> Expected | None:
        """Run the module's own forward on copies. None where what it would have found is no longer known."""
        call, cache = planned.call, planned.cache
        if call.x.is_cuda and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                f"{self.name}: a call of a kind that has not been checked yet is being captured as a CUDA graph; run "
                "it before, as often as check_calls says, or patch with check=False"
            )
        found = self._as_found(planned)
        if found is None:
            return None
        frames, states = found
        kv_cache = {**{name: copied(entry) for name, entry in call.kv_cache.items()}, **states}
        kv_bank = None if call.kv_bank is None else {name: copied(entry) for name, entry in call.kv_bank.items()}
        given = {**call.given, "kv_cache": kv_cache}
        if "kv_bank" in given:
            given["kv_bank"] = kv_bank
        was = {name: states[name].clone() for name in ("k", "v")}
        was_bank = {name: copied(kv_bank[name]) for name in ("k_new", "v_new", *INDICES) if kv_bank and name in kv_bank}
        indices = tuple(int(kv_cache[name]) for name in INDICES if name in kv_cache)
        result = self._call_own(given)
        if not planned.stored:
            for slot, frame in planned.step.overwritten:
                tokens = slice(slot * cache.tokens, (slot + 1) * cache.tokens)
                self.given_up[frame] = tuple(call.kv_cache[name][:, tokens].clone() for name in ("k", "v"))
        return Expected(result, frames, kv_cache, kv_bank, was, was_bank, indices)

    def _call_own(self, given: dict) -> object:
        parameters = inspect.signature(self.own).parameters.values()
        args = [value for p in parameters if p.kind is p.VAR_POSITIONAL for value in given[p.name]]
        extra = {k: v for p in parameters if p.kind is p.VAR_KEYWORD for k, v in given[p.name].items()}
        names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        if args:
            first = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
            args = [given[name] for name in first] + args
            names = [name for name in names if name not in first]
        with torch.no_grad():
            return self.own(*args, **{name: given[name] for name in names}, **extra)

    def _as_found(self, planned: Planned) -> tuple[tuple[int, ...], dict[str, Tensor]] | None:
        """The cache as the module's own code would have it before this call, and the frames in it, in its order."""
        call, cache = planned.call, planned.cache
        if cache.held.unstored is None or self.begun is None:
            if cache.held.unstored is not None and cache.held.lost:
                return None  # patched in the middle of a chunk
            self.begun, self.given_up = cache.held, {}
        held, slot_of = self.begun, {frame: slot for slot, frame in enumerate(cache.held.frames)}
        frames = tuple(held.frames[slot] for slot in held.order(cache.sink, cache.slots) if slot < len(held.frames))
        if any(frame not in slot_of and frame not in self.given_up for frame in frames):
            return None
        if self.given_up and cache.key_version is not None and cache.touched(call.kv_cache):
            return None  # somebody wrote into the buffers in the middle of a chunk
        states = {}
        for index, name in enumerate(("k", "v")):
            buffer = call.kv_cache[name]
            states[name] = torch.zeros_like(buffer, memory_format=torch.contiguous_format)
            for place, frame in enumerate(frames):
                at = slice(place * cache.tokens, (place + 1) * cache.tokens)
                if frame in self.given_up:
                    states[name][:, at] = self.given_up[frame][index]
                else:
                    slot = slot_of[frame]
                    states[name][:, at] = buffer[:, slot * cache.tokens : (slot + 1) * cache.tokens]
        return frames, states

    def compare(self, planned: Planned, kind: tuple, expected: Expected, attention: CallerAttention) -> Tensor:
        """Our output. Raises ValueError, saying what differs, where and by how much."""
        scores: list[Tensor] = []
        output = attention.run(planned, scores)
        own = expected.result[0] if isinstance(expected.result, tuple) else expected.result
        compared = [("output", output, own)]
        compared += self._new_frames(planned, expected) + self._other_frames(planned, expected)
        for name in ("k_new", "v_new"):
            if name in expected.was_bank and not torch.equal(expected.was_bank[name], expected.kv_bank[name]):
                compared.append((f"kv_bank[{name!r}]", planned.call.kv_bank[name], expected.kv_bank[name]))
        allowed = self._tolerance(output)
        for what, ours, theirs in compared:
            if ours.shape != theirs.shape:
                self._refuse(planned, f"{what} of shape {list(theirs.shape)}, ours {list(ours.shape)}")
            error = _relative(ours, theirs)
            if not error <= allowed:
                if what == "output" and _is_close(planned, scores):
                    return output
                self._refuse(planned, f"another {what} (relative difference {error:.2%}, tolerance {allowed:.2%})")
        self._compare_indices(planned, expected)
        self.seen[kind] += 1
        if planned.stored:
            self.begun, self.given_up = None, {}
        return output

    def _tolerance(self, output: Tensor) -> float:
        if self.tolerance is not None:
            return self.tolerance
        return 1e-4 if output.device.type == "cpu" and output.dtype not in HALF else 1e-2

    def _new_frames(self, planned: Planned, expected: Expected) -> list[tuple[str, Tensor, Tensor]]:
        """Keys and values of the call's own frames, where the module's own code shows what it makes of them."""
        info = _update_info(expected.result)
        tokens, found = planned.cache.tokens, []
        for name in ("k", "v"):
            new = None if info is None else info.get(f"new_{name}")
            if not isinstance(new, Tensor) or new.ndim != 4 or new.shape[1] % tokens:
                continue
            skipped = planned.call.grid[0] - new.shape[1] // tokens
            for index, slot in enumerate(planned.step.places):
                if slot >= 0 and index >= skipped:
                    at = slice((index - skipped) * tokens, (index - skipped + 1) * tokens)
                    what = f"{name} of frame {planned.call.start + index} in the cache"
                    found.append((what, _slot(planned, name, slot), new[:, at]))
        return found

    def _other_frames(self, planned: Planned, expected: Expected) -> list[tuple[str, Tensor, Tensor]]:
        """The cache afterwards: as its own code left it, if it writes at once; otherwise all other frames as before."""
        tokens, step, found = planned.cache.tokens, planned.step, []
        writes = any(not torch.equal(expected.kv_cache[name], expected.was[name]) for name in ("k", "v"))
        if writes and planned.stored:
            held = step.stored
            order = [slot for slot in held.order(planned.cache.sink, planned.cache.slots) if slot < len(step.frames)]
            places, states = [(place, slot) for place, slot in enumerate(order)], expected.kv_cache
        else:
            new = set(range(planned.call.start, planned.call.start + planned.call.grid[0]))
            slot_of = {
                frame: slot for slot, frame in enumerate(step.frames) if frame not in new or slot not in step.places
            }
            places = [(place, slot_of[frame]) for place, frame in enumerate(expected.frames) if frame in slot_of]
            states = expected.was
        for place, slot in places:
            at = slice(place * tokens, (place + 1) * tokens)
            for name in ("k", "v"):
                what = f"{name} of frame {step.frames[slot]} in the cache"
                found.append((what, _slot(planned, name, slot), states[name][:, at]))
        return found

    def _compare_indices(self, planned: Planned, expected: Expected) -> None:
        if not planned.stored:
            return
        theirs = tuple(int(expected.kv_cache[name]) for name in INDICES if name in expected.kv_cache)
        if theirs == expected.indices:  # it leaves them to the model, and gives them back
            theirs = _indices(expected.result)
        ours = planned.cache.ends()
        if theirs and theirs != ours:
            self._refuse(planned, f"indices {theirs}, ours are {ours}")
        for name in INDICES if expected.was_bank else ():
            own, bank = int(expected.kv_bank[name]), int(planned.call.kv_bank[name])
            if own != int(expected.was_bank[name]) and own != bank:
                self._refuse(planned, f"kv_bank[{name!r}] {own}, ours is {bank}")

    def _refuse(self, planned: Planned, what: str) -> None:
        call, held = planned.call, planned.cache.held
        self.seen.clear()
        first = call.start * planned.cache.tokens
        raise ValueError(
            f"{self.name}: its own code gives {what}, at current_start {first} with {len(held.frames)} of "
            f"{planned.cache.slots} frames in the cache. {self._meaning(planned)} This fork is not served as it is: "
            "unpatch(model), or patch with check=False if you know better"
        )

    def _meaning(self, planned: Planned) -> str:
        call = planned.call
        if call.unusual:
            return f"{' and '.join(call.unusual)} is set, and this module uses it."
        if planned.chooses:
            return "Usually this means another choice of frames: another top_k, or scores of another kind."
        if call.start == 0:
            return (
                "Usually this means other positions, another scale of the logits, or values that are not as they came."
            )
        if planned.seen:
            return "Usually this means another record_interval, or a bank that is seen otherwise."
        if planned.step.overwritten or self.rolled:
            return "Usually this means positions by distance, or a sink or window that is kept otherwise."
        return "Usually this means positions by distance, a bias on older frames, or another window."


def _is_close(planned: Planned, scores: list[Tensor]) -> bool:
    """Whether what heads choose frames by is so close in 16-bit numbers that rounding may decide."""
    if not scores or planned.call.x.dtype not in HALF:
        return False
    ranked = scores[0].sort(-1, descending=True).values
    margin = ranked[..., planned.settings.top_k - 1] - ranked[..., planned.settings.top_k]
    return bool((margin < CLOSE * ranked.abs().amax(-1)).any())


def _relative(ours: Tensor, theirs: Tensor) -> float:
    theirs = theirs.double()
    norm = theirs.norm().item()
    error = (ours.double() - theirs).norm().item()
    return error / norm if norm else error


def _slot(planned: Planned, name: str, slot: int) -> Tensor:
    tokens = planned.cache.tokens
    return planned.call.kv_cache[name][:, slot * tokens : (slot + 1) * tokens]


def _update_info(result) -> dict | None:
    """The description of a deferred update in (output, (global end, local end, description))."""
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], tuple) and len(result[1]) == 3:
        return result[1][2] if isinstance(result[1][2], dict) else None
    return None


def _indices(result) -> tuple[int, int] | None:
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], tuple) and len(result[1]) >= 2:
        return tuple(int(end) for end in result[1][:2])
    return None

"""What a patched self-attention can serve: the module when it is patched, the arguments in every call."""

from __future__ import annotations

import inspect
from typing import NamedTuple

import torch
from torch import Tensor, nn

from memflow.integrations.mirror import version
from memflow.memory.config import MemoryConfig
from memflow_kernels.ops._checks import MAX_HEAD_DIM
from memflow_kernels.reference.rotary import rotation_table

_KNOWN_PARAMETERS = {
    "x", "seq_lens", "grid_sizes", "freqs", "block_mask", "kv_cache", "current_start", "cache_start",
    "kv_bank", "update_bank", "is_recache", "update_cache",
}  # fmt: skip


class Call(NamedTuple):
    """The arguments of a self-attention's forward. grid: (frames, rows, columns). start: number of the first frame.
    update_cache: None where the module has no such parameter."""

    x: Tensor
    grid: tuple[int, int, int]
    start: int
    kv_cache: dict
    kv_bank: dict | None
    update_bank: bool
    is_recache: bool
    update_cache: bool | None


def check_module(name: str, module: nn.Module, attributes: tuple[str, ...]) -> None:
    """ValueError where a self-attention lacks an attribute or has one that our kernels do not compute."""
    for attribute in attributes:
        if getattr(module, attribute, None) is None:
            raise ValueError(f"{name}.{attribute}: is missing")
    for attribute in ("q", "k", "v", "o"):
        if not callable(getattr(module, attribute)):
            raise ValueError(f"{name}.{attribute}: must be a linear layer, got {type(getattr(module, attribute))}")
    for attribute in ("norm_q", "norm_k"):
        norm = getattr(module, attribute)
        weight, eps = getattr(norm, "weight", None), getattr(norm, "eps", None)
        if not isinstance(weight, Tensor) or not isinstance(eps, float) or getattr(norm, "bias", None) is not None:
            raise ValueError(
                f"{name}.{attribute}: must be an RMS norm over all heads with weight and eps, got {type(norm).__name__}"
            )
        if weight.ndim != 1 or weight.numel() % module.num_heads:
            raise ValueError(
                f"{name}.{attribute}: its weight must have one number per channel of all {module.num_heads} heads, "
                f"got {list(weight.shape)}"
            )
        channels = getattr(getattr(module, attribute[-1]), "out_features", weight.numel())
        if weight.numel() != channels:
            raise ValueError(f"{name}.{attribute}: must be over all {channels} channels, got {weight.numel()}")
        head_dim = weight.numel() // module.num_heads
        if head_dim % 2 or head_dim > MAX_HEAD_DIM:
            raise ValueError(f"{name}.num_heads: heads of {head_dim} channels; even sizes to {MAX_HEAD_DIM} are served")
    if module.norm_q.eps != module.norm_k.eps:
        raise ValueError(f"{name}.norm_k: eps {module.norm_k.eps} differs from that of norm_q, {module.norm_q.eps}")


class GridSizes:
    """Reads `grid_sizes`; a tensor is read once, however many layers get it."""

    def __init__(self):
        self.last: tuple[Tensor, int | None, tuple[int, int, int]] | None = None

    def read(self, grid_sizes, name: str) -> tuple[int, int, int]:
        """(frames, rows, columns) of a call of the module `name`."""
        if not isinstance(grid_sizes, Tensor):
            return self._common([tuple(int(size) for size in row) for row in grid_sizes], name)
        count = version(grid_sizes)
        if self.last is None or self.last[0] is not grid_sizes or count is None or self.last[1] != count:
            grid = self._common([tuple(row) for row in grid_sizes.tolist()], name)
            self.last = (grid_sizes, count, grid)
        return self.last[2]

    def _common(self, rows: list[tuple[int, ...]], name: str) -> tuple[int, int, int]:
        if len(set(rows)) != 1 or len(rows[0]) != 3:
            raise ValueError(
                f"{name}.forward: grid_sizes must be one (frames, rows, columns) for all batch rows, got {rows}"
            )
        return rows[0]


class Inputs:
    """Reads the arguments of one self-attention's calls. sizes: shared by all layers of a model."""

    def __init__(self, name: str, signature: inspect.Signature, memory: MemoryConfig, sizes: GridSizes):
        self.name, self.signature, self.memory, self.sizes = name, signature, memory, sizes
        self.freqs: Tensor | None = None

    def read(self, module: nn.Module, args: tuple, kwargs: dict) -> Call:
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        for parameter, value in given.items():
            unset = value is None or value is self.signature.parameters[parameter].default
            unset = unset or (isinstance(value, (tuple, dict)) and not value)
            if parameter not in _KNOWN_PARAMETERS and not unset:
                raise ValueError(f"{self.name}.forward: its argument {parameter} is not served, got {value!r}")
        x, kv_cache, kv_bank = given["x"], given["kv_cache"], given.get("kv_bank")
        if kv_cache is None:
            raise ValueError(f"{self.name}.forward: kv_cache is None (training with a block_mask) is not served")
        grid = self.sizes.read(given["grid_sizes"], self.name)
        if x.ndim != 3 or grid[0] * grid[1] * grid[2] != x.shape[1]:
            raise ValueError(
                f"{self.name}.forward: x must be [B, {grid[0]} * {grid[1]} * {grid[2]}, C] as grid_sizes says, without "
                f"padding, got {list(x.shape)}"
            )
        self._check_freqs(given.get("freqs"), module)
        start = self._start(given, grid[1] * grid[2])
        self._check_cache(kv_cache, grid[1] * grid[2])
        if kv_bank is not None:
            self._check_bank(kv_bank, grid[1] * grid[2], bool(given.get("update_bank")))
        update_cache = given.get("update_cache")
        return Call(
            x,
            grid,
            start,
            kv_cache,
            kv_bank,
            bool(given.get("update_bank")),
            bool(given.get("is_recache")),
            None if update_cache is None else bool(update_cache),
        )

    def _start(self, given: dict, tokens: int) -> int:
        start = int(given["current_start"])
        cache_start = given.get("cache_start")
        if cache_start is not None and int(cache_start) != start:
            raise ValueError(
                f"{self.name}.forward: cache_start {int(cache_start)} must be current_start {start} or None; a cache "
                "that is written elsewhere is not served"
            )
        if start < 0 or start % tokens:
            raise ValueError(
                f"{self.name}.forward: current_start {start} must be a whole number of frames of {tokens} tokens"
            )
        return start // tokens

    def _check_freqs(self, freqs, module: nn.Module) -> None:
        """Our kernels compute the rotation; the caller's table must be the same one."""
        if freqs is self.freqs is not None:
            return
        pairs = module.norm_q.weight.numel() // module.num_heads // 2
        if not isinstance(freqs, Tensor) or not freqs.is_complex() or freqs.ndim != 2 or freqs.shape[1] != pairs:
            got = f"{freqs.dtype} {list(freqs.shape)}" if isinstance(freqs, Tensor) else type(freqs).__name__
            raise ValueError(f"{self.name}.forward: freqs must be a complex table [positions, {pairs}], got {got}")
        expected = rotation_table(2 * pairs, 2, (2, 2), 0, freqs.device)[-1, 0]  # position 1 along every axis
        if freqs.shape[0] < 2 or not torch.allclose(freqs[1].to(expected.dtype), expected, atol=1e-3):
            raise ValueError(
                f"{self.name}.forward: freqs is not the rotation of Wan 2.1 (base 10000 over frame, row and column)"
            )
        self.freqs = freqs

    def _check_cache(self, kv_cache: dict, tokens: int) -> None:
        self._check_entries("kv_cache", kv_cache, ("k", "v", "global_end_index", "local_end_index"))
        frames = self.memory.sink_frames + self.memory.window_frames
        for entry in ("k", "v"):
            held = kv_cache[entry]
            if not isinstance(held, Tensor) or held.ndim != 4 or held.shape[1] != frames * tokens:
                got = list(held.shape) if isinstance(held, Tensor) else type(held).__name__
                raise ValueError(
                    f"{self.name}: kv_cache[{entry!r}] must be [B, {frames} frames * {tokens} tokens, H, D] as memory "
                    f"says (MemoryConfig.published(local_frames={frames})), got {got}"
                )

    def _check_bank(self, kv_bank: dict, tokens: int, recorded: bool) -> None:
        prototype = ("k_new", "v_new") if recorded else ()
        self._check_entries("kv_bank", kv_bank, ("k", "v", "global_end_index", "local_end_index", *prototype))
        frames = self.memory.bank_frames
        if kv_bank["k"].shape[1] != frames * tokens:
            raise ValueError(
                f"{self.name}: kv_bank['k'] must be [B, {frames} frames * {tokens} tokens, H, D] as memory says "
                f"(bank_frames={frames}), got {list(kv_bank['k'].shape)}"
            )

    def _check_entries(self, argument: str, given, needed: tuple[str, ...]) -> None:
        if not isinstance(given, dict):
            raise ValueError(f"{self.name}.forward: {argument} must be a dictionary, got {type(given).__name__}")
        missing = [entry for entry in needed if entry not in given]
        if missing:
            raise ValueError(f"{self.name}.forward: {argument} lacks {', '.join(missing)}; it has {', '.join(given)}")

"""What a patched self-attention can serve: the module when it is patched, the arguments in every call."""

from __future__ import annotations

import ast
import inspect
import reprlib
import textwrap
from collections.abc import Callable
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor, nn

from memflow.integrations.cache import INDICES
from memflow.integrations.caller import Beside, version
from memflow.memory.config import MemoryConfig
from memflow_kernels import MAX_HEAD_DIM

_KNOWN_PARAMETERS = {
    "x", "seq_lens", "grid_sizes", "freqs", "block_mask", "kv_cache", "current_start", "current_end", "cache_start",
    "kv_bank", "update_bank", "is_recache", "update_cache", "sink_recache_after_switch",
}  # fmt: skip
_ENTRIES = {"kv_cache": {"k", "v", *INDICES}, "kv_bank": {"k", "v", *INDICES, "k_new", "v_new"}}


class Call(NamedTuple):
    """The arguments of a self-attention's forward. grid: (frames, rows, columns). start: number of the first frame.
    over_sink: the sink is encoded again with the rest. update_cache: None where the module has no such parameter.
    has_indices: the cache counts what it holds; otherwise that is all frames before the call.
    unusual: arguments that some modules ignore and others do not, as far as they are set. given: all by name."""

    x: Tensor
    grid: tuple[int, int, int]
    start: int
    kv_cache: dict
    kv_bank: dict | None
    update_bank: bool
    is_recache: bool
    over_sink: bool
    update_cache: bool | None
    has_indices: bool
    unusual: tuple[str, ...]
    given: dict


def check_module(name: str, module: nn.Module, attributes: tuple[str, ...]) -> None:
    """ValueError where a self-attention lacks an attribute or has one that our kernels do not compute."""
    for attribute in attributes:
        if getattr(module, attribute, None) is None:
            raise ValueError(f"{name}.{attribute}: is missing")
    heads = module.num_heads
    if isinstance(heads, bool) or not isinstance(heads, Integral) or heads < 1:
        raise ValueError(f"{name}.num_heads: must be a whole number of at least 1, got {heads!r}")
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
    """Reads the arguments of one self-attention's calls.

    sizes: shared by all layers of a model. memory: what the user says of the caches, or None.
    checked: the module's own code runs beside ours, and shows whether it ignores what others use.
    """

    def __init__(self, name: str, forward: Callable, memory: MemoryConfig | None, sizes: GridSizes, checked: bool):
        self.name, self.sizes, self.checked = name, sizes, checked
        frames = () if memory is None else (memory.sink_frames + memory.window_frames, memory.bank_frames)
        self.frames = dict(zip(_ENTRIES, frames, strict=False))  # that memory says of a cache and of a bank
        self.signature = signature = inspect.signature(forward)
        parameters = signature.parameters.values()
        self.positions = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
        self.defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        self.plain = all(p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) for p in parameters)
        self.known: set[tuple] = set()  # how many arguments by position, and which by name, have been bound before
        self.unknown = tuple(p.name for p in parameters if p.name not in _KNOWN_PARAMETERS)
        self.ignores_cache_start = _only_compared_with_none(forward, "cache_start")
        self.freqs: Tensor | None = None
        self.passed: set[tuple] = set()  # caches and banks of these sizes are in order

    def read(self, module: nn.Module, args: tuple, kwargs: dict) -> Call:
        given = self._given(args, kwargs)
        for parameter in self.unknown:
            self._check_unknown(parameter, given[parameter])
        x, kv_cache, kv_bank = given["x"], given["kv_cache"], given.get("kv_bank")
        if kv_cache is None:
            raise ValueError(f"{self.name}.forward: kv_cache is None (training with a block_mask) is not served")
        grid = self.sizes.read(given["grid_sizes"], self.name)
        if x.ndim != 3 or grid[0] * grid[1] * grid[2] != x.shape[1]:
            raise ValueError(
                f"{self.name}.forward: x must be [B, {grid[0]} * {grid[1]} * {grid[2]}, C] as grid_sizes says, without "
                f"padding, got {list(x.shape)}"
            )
        freqs = given.get("freqs")
        if freqs is None or freqs is not self.freqs:
            self._check_freqs(freqs, module)
        tokens = grid[1] * grid[2]
        start, unusual = self._start(given, tokens, x.shape[1])
        self._check_frames("kv_cache", kv_cache, tokens)
        update_bank = bool(given.get("update_bank"))
        if kv_bank is not None:
            self._check_frames("kv_bank", kv_bank, tokens, update_bank)
        update_cache = given.get("update_cache")
        return Call(
            x,
            grid,
            start // tokens,
            kv_cache,
            kv_bank,
            update_bank,
            bool(given.get("is_recache")),
            bool(given.get("sink_recache_after_switch")),
            None if update_cache is None else bool(update_cache),
            INDICES[0] in kv_cache,
            unusual,
            given,
        )

    def _given(self, args: tuple, kwargs: dict) -> dict:
        """The arguments by name, as inspect binds them, which would take as long as a small model's attention."""
        names = len(args), *kwargs
        if names in self.known:
            return {**self.defaults, **dict(zip(self.positions, args, strict=False)), **kwargs}
        bound = self.signature.bind(*args, **kwargs)  # which says what is wrong with them
        bound.apply_defaults()
        if self.plain:
            self.known.add(names)
        return bound.arguments

    def _check_unknown(self, parameter: str, value) -> None:
        default = self.signature.parameters[parameter].default
        if value is None or value is default or (isinstance(value, tuple | dict) and not value):
            return
        if isinstance(value, Tensor) or isinstance(default, Tensor) or value != default:
            got = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else reprlib.repr(value)
            raise ValueError(f"{self.name}.forward: its argument {parameter} is not served, got {got}")

    def _start(self, given: dict, tokens: int, length: int) -> tuple[int, tuple[str, ...]]:
        """current_start in tokens, and which of the arguments are set that some modules ignore."""
        start, unusual = self._number("current_start", given["current_start"]), []
        if start < 0 or start % tokens:
            raise ValueError(
                f"{self.name}.forward: current_start {start} must be a whole number of frames of {tokens} tokens"
            )
        end = given.get("current_end")
        if end is not None and self._number("current_end", end) != start + length:
            raise ValueError(
                f"{self.name}.forward: current_end {int(end)} must be current_start {start} + {length} tokens of x"
            )
        elsewhere = None if self.ignores_cache_start else given.get("cache_start")
        if elsewhere is not None and self._number("cache_start", elsewhere) != start:
            unusual.append("cache_start")
        if given.get("block_mask") is not None:
            unusual.append("block_mask")
        if unusual and not self.checked:
            raise ValueError(
                f"{self.name}.forward: {' and '.join(unusual)} beside kv_cache: some modules ignore it, others attend "
                "by it or write elsewhere. Only check=True can tell; it must be None"
                + (f" (or cache_start {start}, as current_start)" if "cache_start" in unusual else "")
            )
        return start, tuple(unusual)

    def _number(self, argument: str, value) -> int:
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(
                f"{self.name}.forward: {argument} must be one number for all batch rows, got {value.tolist()}"
            )
        return int(value)

    def _check_freqs(self, freqs, module: nn.Module) -> None:
        """Our kernels compute the rotation; the caller's table must be the same one."""
        pairs = module.norm_q.weight.numel() // module.num_heads // 2
        if not isinstance(freqs, Tensor) or not freqs.is_complex() or freqs.ndim != 2 or freqs.shape[1] != pairs:
            got = f"{freqs.dtype} {list(freqs.shape)}" if isinstance(freqs, Tensor) else type(freqs).__name__
            raise ValueError(f"{self.name}.forward: freqs must be a complex table [positions, {pairs}], got {got}")
        third = pairs // 3
        axes = [
            torch.arange(m, dtype=torch.float64, device="cpu") / max(m, 1) for m in (pairs - 2 * third, third, third)
        ]
        speed = 10000.0 ** -torch.cat(axes)  # of a position along an axis, as Wan 2.1 defines it
        expected = torch.polar(torch.ones_like(speed), speed).to(freqs.device)
        if freqs.shape[0] < 2 or not torch.allclose(freqs[1].to(expected.dtype), expected, atol=1e-3):
            raise ValueError(
                f"{self.name}.forward: freqs is not the rotation of Wan 2.1 (base 10000 over frame, row and column)"
            )
        self.freqs = freqs

    def _check_frames(self, argument: str, given, tokens: int, recorded: bool = False) -> None:
        """A cache or bank has the entries that it needs and no others, and holds whole frames, as many as memory says.
        recorded: a prototype is put into a bank."""
        if not isinstance(given, dict) or given.keys() != _ENTRIES[argument]:
            self._check_entries(argument, given, recorded)
        kind = argument, tokens, getattr(given["k"], "shape", None), getattr(given["v"], "shape", None)
        if kind in self.passed:
            return
        frames, field = self.frames.get(argument), "local_frames" if argument == "kv_cache" else "bank_frames"
        said = "" if frames is None else f" as memory says (MemoryConfig.published({field}={frames}))"
        for entry in ("k", "v"):
            held = given[entry]
            length = held.shape[1] if isinstance(held, Tensor) and held.ndim == 4 else 0
            if not length or length % tokens or frames not in (None, length // tokens):
                got = list(held.shape) if isinstance(held, Tensor) else type(held).__name__
                raise ValueError(
                    f"{self.name}: {argument}[{entry!r}] must be [B, {'' if frames is None else f'{frames} '}frames * "
                    f"{tokens} tokens, H, D]{said}, got {got}"
                )
        self.passed.add(kind)

    def _check_entries(self, argument: str, given, recorded: bool) -> None:
        if not isinstance(given, dict):
            raise ValueError(f"{self.name}.forward: {argument} must be a dictionary, got {type(given).__name__}")
        counted = argument == "kv_bank" or any(entry in given for entry in INDICES)
        needed = ("k", "v", *(INDICES if counted else ()), *(("k_new", "v_new") if recorded else ()))
        missing, known = [entry for entry in needed if entry not in given], _ENTRIES[argument]
        if missing:
            raise ValueError(f"{self.name}.forward: {argument} lacks {', '.join(missing)}; it has {', '.join(given)}")
        unknown = [str(entry) for entry in given if entry not in known and not _inactive(given[entry])]
        if unknown:
            raise ValueError(
                f"{self.name}.forward: {argument} has {', '.join(unknown)}, which may change what is held or seen and "
                f"is not served; known are {', '.join(sorted(known))}"
            )


def _only_compared_with_none(forward: Callable, parameter: str) -> bool:
    """Whether the code of a function does nothing with a parameter but to ask whether it is None."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):
        return False
    used = {node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == parameter}
    used = {node for node in used if isinstance(node.ctx, ast.Load)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Is | ast.IsNot):
            against = node.comparators[0]
            if isinstance(against, ast.Constant) and against.value is None:
                used.discard(node.left)
    return not used


_OFF: Beside[int | None] = Beside()  # by tensor: its version when it said that something is off


def _inactive(value) -> bool:
    """Whether an entry that is not known says that something is off: nothing, False, 0 or -1, also in a tensor."""
    if isinstance(value, Tensor):
        count = version(value)
        if count is None or _OFF.get(value) != count:  # read on the host only where it has changed
            if value.numel() != 1 or int(value) not in (0, -1):
                return False
            _OFF.set(value, count)
        return True
    return value is None or value in (False, -1) or (isinstance(value, str | tuple | list | dict) and not value)

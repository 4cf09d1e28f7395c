"""What tests and benchmarks share: cases, random states in several memory layouts, error budgets, poisoned memory.

Errors are relative Frobenius errors against float64. A budget is derived from the format: half-precision results may
differ by half a unit in the last place for every rounding on the way, float32 by 1e-5, float64 by 1e-12.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .backends import dispatch
from .operators import NAMESPACE, UNRECORDED

LAYOUTS = ("dense", "sliced", "heads_first", "fused", "padded")


class AttentionCase(NamedTuple):
    """Sizes of one memory_attention call; top_k None = dense."""

    name: str
    batch: int
    queries: int
    heads: int
    head_dim: int
    tokens_per_frame: int
    frames: int
    candidate_frames: int
    top_k: int | None


ATTENTION_CASES = (
    AttentionCase("dense", 1, 36, 3, 24, 12, 5, 0, None),
    AttentionCase("top3_of6_window9", 1, 36, 4, 32, 12, 15, 6, 3),
    AttentionCase("batch2_top1", 2, 17, 3, 20, 7, 6, 4, 1),
    AttentionCase("no_window", 2, 9, 2, 16, 5, 4, 4, 2),
    AttentionCase("keeps_all", 1, 10, 2, 16, 5, 4, 3, 8),
    AttentionCase("one_frame", 1, 4, 1, 8, 3, 1, 0, None),
    AttentionCase("one_token", 2, 1, 2, 1, 1, 3, 2, 1),
    AttentionCase("head_256", 1, 20, 1, 256, 6, 4, 2, 1),
)


def states(
    batch: int,
    tokens: int,
    heads: int,
    head_dim: int,
    *,
    dtype: torch.dtype = torch.float32,
    layout: str = "dense",
    device: torch.device | str | None = None,
    seed: int = 0,
    mean: float = 0.0,
) -> Tensor:
    """Normal random [batch, tokens, heads, head_dim] with a dense last dimension, laid out in memory as `layout` says.

    dense: contiguous. sliced: a range of a longer buffer. heads_first: stored as [B, H, L, D]. fused: the middle of
    query, key and value stored together. padded: heads further apart than head_dim, at an odd offset.
    The numbers are the same on every device; device: torch's default device by default.
    """
    shape = {
        "dense": (batch, tokens, heads, head_dim),
        "sliced": (batch, tokens + 5, heads, head_dim),
        "heads_first": (batch, heads, tokens, head_dim),
        "fused": (batch, tokens, 3, heads, head_dim),
        "padded": (batch, tokens, heads, head_dim + 3),
    }[layout]
    generator = torch.Generator("cpu").manual_seed(seed)
    x = torch.randn(shape, dtype=torch.float64, generator=generator, device="cpu") + mean
    x = x.to(device or torch.get_default_device(), dtype)
    if layout == "sliced":
        return x[:, 2 : 2 + tokens]
    if layout == "heads_first":
        return x.transpose(1, 2)
    if layout == "fused":
        return x[:, :, 1]
    return x[..., 1 : 1 + head_dim] if layout == "padded" else x


def draw(function: Callable[..., Tensor], *arguments: object, seed: int, **options: object) -> Tensor:
    """function(*arguments, **options) of torch's random functions: the same numbers on every device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return function(*arguments, generator=generator, device="cpu", **options).to(torch.get_default_device())


def attention_inputs(case: AttentionCase, **options: object) -> tuple[Tensor, Tensor, Tensor]:
    """query, key and value of a case; options as for states.

    Values have mean 1: were the true output near 0, a relative error would only measure the cancellation.
    """
    seed = options.pop("seed", 0)
    tokens = case.frames * case.tokens_per_frame
    query = states(case.batch, case.queries, case.heads, case.head_dim, seed=3 * seed, **options)
    key = states(case.batch, tokens, case.heads, case.head_dim, seed=3 * seed + 1, **options)
    value = states(case.batch, tokens, case.heads, case.head_dim, seed=3 * seed + 2, mean=1.0, **options)
    return query, key, value


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected| in Frobenius norms, in float64; infinities must agree and are left out."""
    actual, expected = actual.detach().double(), expected.detach().double().to(actual.device)
    if actual.shape != expected.shape:
        raise AssertionError(f"shape {list(actual.shape)} instead of {list(expected.shape)}")
    infinite = expected.isinf()
    if not torch.equal(actual[infinite], expected[infinite]):
        return float("inf")
    difference = torch.linalg.vector_norm(actual[~infinite] - expected[~infinite]).item()
    norm = torch.linalg.vector_norm(expected[~infinite]).item()
    return difference / norm if norm > 0 else difference


def budget(dtype: torch.dtype, roundings: int = 1) -> float:
    """Largest relative error allowed for a result in `dtype` after so many roundings to it."""
    if dtype in (torch.bfloat16, torch.float16):
        return roundings * torch.finfo(dtype).eps / 2
    return 1e-12 if dtype == torch.float64 else 1e-5


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None, roundings: int = 1) -> None:
    """`actual` is within budget(dtype, roundings) of `expected`; dtype is that of `actual` by default."""
    error = relative_error(actual, expected)
    allowed = budget(dtype or actual.dtype, roundings)
    if not error <= allowed:  # also fails for NaN
        raise AssertionError(f"relative error {error:.3g}, allowed {allowed:.3g}")


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside the block every uninitialised tensor holds NaN (the largest integer for integers)."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled


class Traffic(TorchDispatchMode):
    """Records what every tensor operation in the block writes, also inside the ops of this package.

    written: list of (operation, bytes), one entry per operation that writes; views write nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.written: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == NAMESPACE:
            device = next(x.device for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
            with self:
                name = func._schema.name.removeprefix(f"{NAMESPACE}::").removesuffix(UNRECORDED)
                return dispatch(name, device)(*args, **kwargs)
        result = func(*args, **kwargs)
        held = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        changes = func._schema.is_mutable
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        size = sum(x.nbytes for x in outputs if changes or x.untyped_storage().data_ptr() not in held)
        if size:
            self.written.append((func._schema.name, size))
        return result

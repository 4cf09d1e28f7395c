"""What a patched self-attention gives back: the return value that the blocks around it expect."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class PatchedCall(NamedTuple):
    """What a patched self-attention has just done, for `patch(returns=...)`.

    output: [B, L, C]. kv_cache: the caller's dictionary. stored: whether the call counts in its indices.
    global_end, local_end: the indices in tokens as they are now.
    """

    output: Tensor
    kv_cache: dict
    stored: bool
    global_end: int
    local_end: int


Returns = Callable[[PatchedCall], object]

# A deferred update that changes nothing: it has been made. The second keeps the model from setting the indices.
DONE = {"action": "none", "is_recompute": True}


def plain(call: PatchedCall) -> Tensor:
    """The output."""
    return call.output


def with_indices(call: PatchedCall) -> tuple:
    """(output, (global end, local end, None))."""
    return call.output, (call.global_end, call.local_end, None)


def with_update(call: PatchedCall) -> tuple:
    """(output, (global end, local end, a deferred update that changes nothing))."""
    return call.output, (call.global_end, call.local_end, {**DONE})


def recognised(name: str, result: object) -> Returns:
    """What makes return values of the kind of `result`, which the self-attention `name` has returned."""
    if isinstance(result, Tensor):
        return plain
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], Tensor) and _is_info(result[1]):
        return with_indices if result[1][2] is None else with_update
    got = (
        f"({', '.join(type(part).__name__ for part in result)})" if isinstance(result, tuple) else type(result).__name__
    )
    raise ValueError(
        f"{name}.forward: returns {got}, which is not recognised: say what its block expects, for example "
        "patch(model, returns=lambda call: (call.output, None))"
    )


def _is_info(info: object) -> bool:
    if not isinstance(info, tuple) or len(info) != 3 or not all(isinstance(end, int) for end in info[:2]):
        return False
    return info[2] is None or (isinstance(info[2], dict) and "action" in info[2])

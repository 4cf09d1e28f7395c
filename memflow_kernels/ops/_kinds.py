"""Checks that need not run again: a stream calls an op with arguments of the same kind over and over.

Checking the arguments of one layer costs some 50 us of the host's time, as much as a linear layer of a small model;
recognising their kind costs a tenth of that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

_MOST = 512  # kinds that a check remembers


def once_per_kind(check: Callable[..., None]) -> Callable[..., None]:
    """Run `check(*arguments)` only for arguments unlike all that it let through before.

    Alike are tensors of one type, shape, dtype, device, layout and strides, and equal values of one type. The check may
    read nothing else, neither a tensor's numbers nor the state of the process.
    """
    passed: set[tuple] = set()

    @functools.wraps(check)
    def checked(*arguments) -> None:
        if torch.compiler.is_compiling():  # checked while it is traced, and not at all when the graph runs
            return check(*arguments)
        try:
            kinds = tuple([_kind(x) for x in arguments])
            if kinds in passed:
                return None
        except (TypeError, RuntimeError):  # a list, a symbolic size, a tensor without strides
            return check(*arguments)
        check(*arguments)
        if len(passed) >= _MOST:
            passed.clear()
        passed.add(kinds)
        return None

    return checked


def _kind(x: object) -> tuple:
    if isinstance(x, Tensor):
        return type(x), x.shape, x.dtype, x.device, x.layout, x.stride()
    if isinstance(x, tuple):
        return type(x), *[_kind(part) for part in x]
    return type(x), x

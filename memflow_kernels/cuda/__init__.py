"""The ops as compiled CUDA kernels: the backend `cuda`, named and called like memflow_kernels.reference.

The kernels are in csrc/, compiled ahead of time or at first use (`extension`). A call that they do not serve, see
`coverage`, runs on the backend that is the default without them: triton, or torch where there is no triton.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .. import backends
from ..choosing import composed
from ..operators import OPERATORS
from .coverage import LIMITS, unserved


def _op(name: str) -> Callable:
    def others(*arguments: object):
        return backends.implementation(name, backends.uncompiled())(*arguments)

    def run(*arguments: object):
        if unserved(name, *arguments) is not None:
            return others(*arguments)
        return getattr(torch.ops.memflow_cuda, name)(*arguments)

    chosen = run if name in LIMITS else others
    chosen.__name__ = name
    return chosen


_OPS = {name: _op(name) for name in OPERATORS}
_PARTS = [_OPS[name] for name in ("frame_means", "select_frames", "memory_attention")]
globals().update({**_OPS, "memory_attention_top_k": composed(*_PARTS)})

"""The ops as compiled CUDA kernels: the backend `cuda`, named and called like memflow_kernels.reference.

The kernels are in csrc/, compiled ahead of time or at first use (`extension`). A call that they do not serve, see
`coverage`, runs on the backend that is the default without them: triton, or torch where there is no triton.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .. import backends
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


frame_means = _op("frame_means")
memory_attention = _op("memory_attention")
memory_attention_backward = _op("memory_attention_backward")
merge_attention = _op("merge_attention")
merge_attention_backward = _op("merge_attention_backward")
prompt_relevance_mean = _op("prompt_relevance_mean")
prompt_relevance_softmax = _op("prompt_relevance_softmax")
prompt_relevance_softmax_backward = _op("prompt_relevance_softmax_backward")
qk_norm_rope = _op("qk_norm_rope")
qk_norm_rope_backward = _op("qk_norm_rope_backward")
qk_norm_rope_write = _op("qk_norm_rope_write")
replace_frame = _op("replace_frame")
select_frames = _op("select_frames")

__all__ = [
    "frame_means",
    "memory_attention",
    "memory_attention_backward",
    "merge_attention",
    "merge_attention_backward",
    "prompt_relevance_mean",
    "prompt_relevance_softmax",
    "prompt_relevance_softmax_backward",
    "qk_norm_rope",
    "qk_norm_rope_backward",
    "qk_norm_rope_write",
    "replace_frame",
    "select_frames",
]

"""The ops as Triton kernels: the backend `triton`, named and called like memflow_kernels.reference.

The kernels compute in float32. float64 tensors, which exist to check results, are handed to the torch backend. The
values of index tensors are not read on the host: what a slot or a table names outside the pool is not touched.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from .. import reference
from . import attention, means, merge, qk_norm_rope, qk_norm_rope_backward, relevance, replacement, selection


def _float64_by_torch(kernels: Callable) -> Callable:
    specification = getattr(reference, kernels.__name__)

    @functools.wraps(kernels)
    def run(first: torch.Tensor, *rest: object):
        return (specification if first.dtype == torch.float64 else kernels)(first, *rest)

    return run


memory_attention = _float64_by_torch(attention.memory_attention)
memory_attention_backward = _float64_by_torch(attention.memory_attention_backward)
frame_means = _float64_by_torch(means.frame_means)
merge_attention = _float64_by_torch(merge.merge_attention)
merge_attention_backward = _float64_by_torch(merge.merge_attention_backward)
prompt_relevance_mean = _float64_by_torch(relevance.prompt_relevance_mean)
prompt_relevance_softmax = _float64_by_torch(relevance.prompt_relevance_softmax)
prompt_relevance_softmax_backward = _float64_by_torch(relevance.prompt_relevance_softmax_backward)
replace_frame = _float64_by_torch(replacement.replace_frame)
select_frames = _float64_by_torch(selection.select_frames)
qk_norm_rope_write = _float64_by_torch(qk_norm_rope.qk_norm_rope_write)
# last: modules of these names give way to their ops
qk_norm_rope_backward = _float64_by_torch(qk_norm_rope_backward.qk_norm_rope_backward)
qk_norm_rope = _float64_by_torch(qk_norm_rope.qk_norm_rope)

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

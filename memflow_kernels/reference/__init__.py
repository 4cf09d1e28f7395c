"""The ops in plain torch: the specification of every other backend, and the backend `torch`.

One function per op, named like the op. Inputs were checked by memflow_kernels.ops; only the values of index tensors
are checked here, and only on the CPU, where reading them waits for nothing.
"""

from .attention import memory_attention, memory_attention_backward
from .means import frame_means
from .merge import merge_attention, merge_attention_backward
from .qk_norm_rope import qk_norm_rope, qk_norm_rope_backward, qk_norm_rope_write
from .relevance import prompt_relevance_mean, prompt_relevance_softmax, prompt_relevance_softmax_backward
from .replacement import replace_frame
from .rotary import rms_norm, rotate_3d
from .selection import select_frames

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
    "rms_norm",
    "rotate_3d",
    "select_frames",
]

"""Kernels for memory attention in streaming video generators: tensors in, tensors out.

Layouts: query [B, Lq, H, D], key and value [B, F*N, H, D] with N tokens per frame. See docs/design.md for the words.
"""

from .backends import available_backends, use_backend
from .masks import block_causal_table
from .ops._checks import MAX_HEAD_DIM as MAX_HEAD_DIM
from .ops.attention import memory_attention
from .ops.covering import cover_frames
from .ops.means import frame_means
from .ops.merge import merge_attention
from .ops.qk_norm_rope import qk_norm_rope, qk_norm_rope_write
from .ops.relevance import prompt_relevance
from .ops.replacement import replace_frame
from .ops.rotation import rotate_keys, rotate_keys_write
from .ops.selection import select_frames
from .pool import Pool

__all__ = [
    "Pool",
    "available_backends",
    "block_causal_table",
    "cover_frames",
    "frame_means",
    "memory_attention",
    "merge_attention",
    "prompt_relevance",
    "qk_norm_rope",
    "qk_norm_rope_write",
    "replace_frame",
    "rotate_keys",
    "rotate_keys_write",
    "select_frames",
    "use_backend",
]

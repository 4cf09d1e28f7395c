"""The path that the kernels replace, step by step as the published system computes it.

Written from the description of its semantics, in plain torch, nothing fused and nothing left out: whole-cache clones,
a roll, an insertion, concatenations, float64 complex rotation, norms of their own, a full score matrix for retrieval.
"""

from .bank import PublishedBank
from .layer import PublishedLayer
from .rotary import complex_table, rms_norm, rotate_complex

__all__ = ["PublishedBank", "PublishedLayer", "complex_table", "rms_norm", "rotate_complex"]

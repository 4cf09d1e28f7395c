"""A cache attention written for flash-attn, before and after.

`before` is what many streaming generators do: concatenate what is remembered with the window, and attend to all of it.
`after` hands the same tensors to `memory_attention`, which can also let every head look at its best frames alone.

    python examples/from_flash_attention.py
"""

import torch
from torch.nn.functional import scaled_dot_product_attention

from memflow_kernels import memory_attention

TOKENS = 24  # per frame


def before(query, remembered_key, remembered_value, window_key, window_value):
    """All tensors [batch, tokens, heads, head_dim], as flash_attn_func takes them."""
    key = torch.cat([remembered_key, window_key], dim=1)
    value = torch.cat([remembered_value, window_value], dim=1)
    # flash_attn_func(query, key, value); SDPA here, so that this runs without a GPU
    states = (x.transpose(1, 2) for x in (query, key, value))
    return scaled_dot_product_attention(*states).transpose(1, 2)


def after(query, key, value, remembered_frames, top_k=None):
    """key and value: one buffer each, remembered frames first, so that nothing is concatenated."""
    return memory_attention(query, key, value, tokens_per_frame=TOKENS, candidate_frames=remembered_frames, top_k=top_k)


query = torch.randn(1, 3 * TOKENS, 4, 64)
key, value = torch.randn(2, 1, 15 * TOKENS, 4, 64).unbind(0)
old = before(query, key[:, : 6 * TOKENS], value[:, : 6 * TOKENS], key[:, 6 * TOKENS :], value[:, 6 * TOKENS :])
print(f"the same to {(after(query, key, value, 6) - old).abs().max():.1e}")
few = after(query, key, value, 6, top_k=3)
difference = (few - old).norm() / old.norm()
print(f"with the top 3 of 6 remembered frames per head: {tuple(few.shape)}, differs by {difference:.2f}")

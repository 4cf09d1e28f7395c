"""A cache attention written for torch's scaled_dot_product_attention, before and after.

The tensors stay as SDPA takes them, [batch, heads, tokens, head_dim]: layout="bhld". Fewer key heads than query heads,
a mask that hides whole frames and a causal part are here too, each compared with SDPA.

    python examples/from_sdpa.py
"""

import torch
from torch.nn.functional import scaled_dot_product_attention

from memflow_kernels import memory_attention, merge_attention

TOKENS = 24  # per frame
HEADS, KEY_HEADS = 8, 2


def before(query, key, value, mask=None):
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


def after(query, key, value, remembered_frames=0, top_k=None):
    """The first frames of key compete for top_k places per head; all later ones are always attended to."""
    return memory_attention(
        query, key, value, tokens_per_frame=TOKENS, candidate_frames=remembered_frames, top_k=top_k, layout="bhld"
    )


def after_with_mask(query, key, value, visible):
    """visible: [batch, heads, frames], True where a head sees a frame; it becomes a table of the frames seen."""
    frames = visible.shape[-1]
    table = torch.where(visible, torch.arange(frames, dtype=torch.int32), -1)
    return memory_attention(
        query, key, value, tokens_per_frame=TOKENS, candidate_frames=frames, frame_table=table, layout="bhld"
    )


def after_with_causal_chunk(query, key, value, remembered_frames, top_k=None):
    """The chunk in hand is causal token by token, what is remembered is seen by all: two exact parts, merged."""
    past = remembered_frames * TOKENS
    sizes = {"tokens_per_frame": TOKENS, "candidate_frames": remembered_frames, "top_k": top_k, "layout": "bhld"}
    out, lse = memory_attention(query, key[:, :, :past], value[:, :, :past], **sizes, return_lse=True)
    groups = query.shape[1] // key.shape[1]
    chunk_key, chunk_value = (x[:, :, past:].repeat_interleave(groups, 1) for x in (key, value))
    # Any attention that returns its log-sum-exp will do: flash-attn, FlexAttention, or as here two products.
    scores = query @ chunk_key.mT * query.shape[-1] ** -0.5
    scores = scores.masked_fill(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), -torch.inf)
    chunk_out = scores.softmax(-1) @ chunk_value
    merged, _ = merge_attention(out.transpose(1, 2), lse, chunk_out.transpose(1, 2), scores.logsumexp(-1))
    return merged.transpose(1, 2)


def same(name, new, old):
    print(f"{name}: the same to {(new - old).abs().max():.1e}")


query = torch.randn(1, HEADS, 3 * TOKENS, 64)
key, value = torch.randn(2, 1, KEY_HEADS, 9 * TOKENS, 64).unbind(0)
same("dense, four query heads to a key head", after(query, key, value), before(query, key, value))

visible = torch.rand(1, HEADS, 9) < 0.5
visible[..., -3:] = True  # the chunk itself
mask = visible.repeat_interleave(TOKENS, -1).unsqueeze(2)  # SDPA wants it per token
same("a mask over frames", after_with_mask(query, key, value, visible), before(query, key, value, mask))

past = torch.ones(3 * TOKENS, 6 * TOKENS, dtype=torch.bool)
causal = torch.cat([past, torch.ones(3 * TOKENS, 3 * TOKENS, dtype=torch.bool).tril()], dim=1)
same("a causal chunk", after_with_causal_chunk(query, key, value, 6), before(query, key, value, causal))

few = after(query, key, value, remembered_frames=6, top_k=3)
print(f"with the top 3 of 6 remembered frames per head: {tuple(few.shape)}")

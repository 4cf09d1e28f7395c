"""Training under the masks of causal video generators: whole frames are hidden, by a table instead of a mask per token.

The numbers are those of a mask per token, which is shown first. Then one self-attention learns to denoise a toy video
by teacher forcing: the clean video and the noisy one stand side by side, and a noisy block sees itself and the clean
blocks before it.

    python examples/causal_training.py
"""

import torch
from torch import nn
from torch.nn.functional import mse_loss, scaled_dot_product_attention

from memflow_kernels import block_causal_table, memory_attention

FRAMES, BLOCK, TOKENS, HEADS, DIM = 6, 2, 8, 2, 32
torch.manual_seed(0)


class CausalAttention(nn.Module):
    """Self-attention [B, L, C] -> [B, L, C] in which every frame sees what its row of the table names."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x, table):
        query, key, value = self.qkv(x).unflatten(2, (3, HEADS, -1)).unbind(2)
        frames = table.shape[2]
        out = memory_attention(
            query, key, value, tokens_per_frame=TOKENS, candidate_frames=frames, frame_table=table, query_block=TOKENS
        )
        return self.out(out.flatten(2))


# The table of Self Forcing, against its mask per token.
table = block_causal_table(FRAMES, BLOCK, batch=4, heads=HEADS)
block = torch.arange(FRAMES * TOKENS) // (BLOCK * TOKENS)
query, key, value = torch.randn(3, 4, FRAMES * TOKENS, HEADS, 16).unbind(0)
ours = memory_attention(
    query, key, value, tokens_per_frame=TOKENS, candidate_frames=FRAMES, frame_table=table, query_block=TOKENS
)
states = (x.transpose(1, 2) for x in (query, key, value))
masked = scaled_dot_product_attention(*states, attn_mask=block[:, None] >= block[None, :]).transpose(1, 2)
print(f"the same as a mask per token: {torch.allclose(ours, masked, atol=1e-6)}")

# Teacher forcing: a video has one colour, which noise hides and the clean past tells.
table = block_causal_table(FRAMES, BLOCK, teacher_forcing=True, batch=4, heads=HEADS)
model = CausalAttention()
half = torch.zeros(2, FRAMES * TOKENS, DIM)  # which half a token belongs to
half[0, :, 0] = 3.0
half = half.flatten(0, 1)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
losses = []
for _ in range(40):
    clean = torch.randn(4, 1, DIM).expand(-1, FRAMES * TOKENS, -1)
    noisy = 0.3 * clean + torch.randn_like(clean)
    told = model(torch.cat([clean, noisy], 1) + half, table)[:, FRAMES * TOKENS :]
    loss = mse_loss(told, clean)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(f"teacher forcing: loss {losses[0]:.2f} -> {losses[-1]:.2f}")

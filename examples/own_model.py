"""A video model that is not Wan remembers: a small causal transformer of one's own, told through the same driver.

It turns all channels of its keys with time (base 100) and none with row and column, which have learned embeddings; it
has LayerNorm and no norm of queries and keys; text enters as a shift in every layer, without cross-attention. All that
the driver asks of a model is in `memflow.models.base.VideoModel`; here the module is that itself.

    python examples/own_model.py
"""

import torch
from torch import nn

from memflow import ChunkDriver, MemoryConfig
from memflow.memory.attention import attend_with_memory
from memflow.memory.places import Rotation
from memflow.memory.views import Prompt
from memflow.models.digests import weights_digest


class Layer(nn.Module):
    def __init__(self, dim: int, heads: int, text_dim: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.text_key = nn.Linear(text_dim, dim)  # by which the memory compares a prompt with its frames
        self.text_shift = nn.Linear(text_dim, dim)

    def forward(self, x, step, index):
        """x [B, F*N, dim]; step: where the call stands in the stream."""
        mask = step.prompt.mask[:, :, None]
        text = (step.prompt.value[index].flatten(2) * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
        query, key, value = self.qkv(self.norm(x) + text).unflatten(2, (3, self.heads, -1)).unbind(2)
        x = x + self.out(attend_with_memory(query, key, value, step, index, rotated=False).flatten(2))
        return x + self.mlp(x)


class OwnModel(nn.Module):
    """Latents [B, 4, F, h, w], a token for every latent pixel."""

    rotation, channels, text_dim, heads, head_dim = Rotation(channels=16, theta=100.0), 4, 32, 4, 16

    def __init__(self, layers: int = 3, size: int = 6):
        super().__init__()
        dim = self.heads * self.head_dim
        self.layers = layers
        self.enter = nn.Linear(self.channels, dim)
        self.place = nn.Parameter(0.1 * torch.randn(size * size, dim))
        self.noise = nn.Linear(1, dim)
        self.blocks = nn.ModuleList(Layer(dim, self.heads, self.text_dim) for _ in range(layers))
        self.leave = nn.Linear(dim, self.channels)

    @property
    def dtype(self):
        return self.place.dtype

    @property
    def device(self):
        return self.place.device

    def grid(self, rows, columns):
        if rows * columns != len(self.place):
            raise ValueError(f"h * w must be {len(self.place)}, got {rows} * {columns}")
        return rows, columns

    def encode_prompt(self, embeds, mask):
        keys = [block.text_key(embeds).unflatten(2, (self.heads, -1)) for block in self.blocks]
        shifts = [block.text_shift(embeds).unflatten(2, (self.heads, -1)) for block in self.blocks]
        return Prompt(torch.stack(keys), torch.stack(shifts), mask)

    def text_version(self):
        return tuple(tensor._version for tensor in self.parameters())  # torch counts what is written to each

    def denoise(self, latents, timestep, step):
        frames = latents.shape[2]
        x = self.enter(latents.flatten(3).permute(0, 2, 3, 1)) + self.place  # [B, F, N, dim]
        x = (x + self.noise(torch.tensor([timestep / 1000], dtype=self.dtype, device=self.device))).flatten(1, 2)
        for index, block in enumerate(self.blocks):
            x = block(x, step, index)
        return self.leave(x).unflatten(1, (frames, -1)).permute(0, 3, 1, 2).reshape(latents.shape)

    def write_clean(self, latents, step):
        self.denoise(latents, 0.0, step)

    def identity(self):
        return weights_digest(self)


def main(chunks: int = 12) -> None:
    torch.manual_seed(0)
    driver = ChunkDriver(OwnModel(), MemoryConfig(bank_frames=4, top_k=3, positions="relative"))
    for chunk in range(chunks):
        if chunk % 4 == 0:
            driver.prompt(torch.randn(1, 5, OwnModel.text_dim))  # the embeddings of a prompt
        latents = torch.randn(1, 4, 3, 6, 6)
        for timestep in (1000.0, 500.0):
            clean = latents - timestep / 1000 * driver.denoise(latents, timestep)
            latents = clean + 0.5 * torch.randn_like(clean)
        driver.keep(clean)
    memory = driver.snapshot()
    print(f"sink {memory.sink}, window {memory.window}")
    print(f"the last layer's bank shows frames {memory.recalled[-1, 0].tolist()}")


if __name__ == "__main__":
    main()

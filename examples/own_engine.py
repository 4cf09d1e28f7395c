"""An engine without modules to patch: it has queries, keys and values in hand and calls the memory layer by layer.

What `flash_attn_with_kvcache` is for a KV cache, `attend_with_memory` is for a memory. The engine here is a loop over
plain tensors; its keys are rotated already, as those of most engines are.

    python examples/own_engine.py
"""

import torch

from memflow.memory import MemoryConfig, Prompt, make_memory
from memflow.memory.attention import attend_with_memory

LAYERS, HEADS, DIM, GRID, CHUNK, TEXT = 2, 4, 24, (3, 5), 3, 6


def main(chunks: int = 8) -> None:
    torch.manual_seed(0)
    config = MemoryConfig(frames_per_chunk=CHUNK, bank_frames=4, top_k=2)
    sizes = {"layers": LAYERS, "batch": 1, "heads": HEADS, "head_dim": DIM, "grid": GRID}
    memory = make_memory(config, **sizes, dtype=torch.float32, device="cpu")
    text = torch.randn(2, LAYERS, 1, TEXT, HEADS, DIM)  # the layers' keys and values of the prompt's tokens
    prompt = Prompt(*text, mask=torch.ones(1, TEXT, dtype=torch.bool))
    for chunk in range(chunks):
        start = chunk * CHUNK
        memory.update(start, prompt)  # what is given up, what is shown
        for _denoising in range(2):  # passes over the same frames overwrite one another; the last is the clean one
            step = memory.pass_over(start, CHUNK, prompt)
            for layer in range(LAYERS):
                query, key, value = torch.randn(3, 1, CHUNK * GRID[0] * GRID[1], HEADS, DIM)
                out = attend_with_memory(query, key, value, step, layer)
        memory.end_chunk(start)
    print(f"attention of {list(out.shape)}; held frames by layer: {memory.held[:, 0].tolist()}")


if __name__ == "__main__":
    main()

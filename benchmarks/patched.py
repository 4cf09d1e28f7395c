"""A patched self-attention beside its own code, pass by pass in turns, in one process.

    python -m benchmarks.patched                                   # the tests' own module, one layer of the 1.3B model
    python -m benchmarks.patched --module FILE.py:Class --sma      # a module of yours: anything that `patch` serves
    python -m benchmarks.patched --grid 3 4 --dim 48 --heads 2 --layers 2 --rounds 200

Denoising passes over a full cache are timed; every round also stores a chunk and moves the bank, outside the clock.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import inspect
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from memflow.integrations import patch
from memflow_kernels.reference.rotary import rotation_table

OWN = f"{Path(__file__).parent.parent}/tests/integrations/causal_wan.py:SelfAttention"
SLOTS, SINK, PLACES, CHUNK = 12, 3, 3, 3


def load(path: str) -> type[nn.Module]:
    """The class in FILE.py:Class."""
    file, _, name = path.rpartition(":")
    spec = importlib.util.spec_from_file_location("module_to_patch", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return getattr(module, name)


def built(kind: type[nn.Module], dim: int, heads: int, tokens: int, sma: bool) -> nn.Module:
    """One module, by the names that its constructor takes."""
    offered = {
        "dim": dim, "num_heads": heads, "heads": heads, "local_attn_size": SLOTS, "sink_size": SINK, "sink": SINK,
        "record_interval": 1, "SMA": sma, "top_k": 3 if sma else None, "store": False,
    }  # fmt: skip
    module = kind(**{k: v for k, v in offered.items() if k in inspect.signature(kind).parameters})
    module.local_attn_size, module.max_attention_size = SLOTS, SLOTS * tokens
    return module.eval().requires_grad_(False)


class Layers(nn.Module):
    """Layers one after another, and the caller's part of the update that they leave to it: none here, the cache is full
    and each pass is timed as the first of its chunk."""

    def __init__(self, layers: list[nn.Module]):
        super().__init__()
        self.blocks, self.num_frame_per_block = nn.ModuleList(layers), CHUNK

    def forward(self, x: Tensor, caches: list[dict], banks: list[dict] | None, update_cache: bool, **context) -> Tensor:
        for index, block in enumerate(self.blocks):
            bank = {} if banks is None else {"kv_bank": banks[index], "update_bank": False}
            out = block(x, kv_cache=caches[index], **bank, **context)
            x = x + (out[0] if isinstance(out, tuple) else out)
        return x


class Side:
    """One of the two: its layers and a cache that holds frames 0 to 11."""

    def __init__(self, model: Layers, options: argparse.Namespace, has_bank: bool, dtype: torch.dtype):
        noise = torch.Generator().manual_seed(1)
        tokens = options.grid[0] * options.grid[1]

        def entries(frames: int) -> dict:
            size = (1, frames * tokens, options.heads, options.dim // options.heads)
            held = {name: torch.randn(size, generator=noise).to(dtype) for name in ("k", "v")}
            return held | {name: torch.tensor([frames * tokens]) for name in ("global_end_index", "local_end_index")}

        self.model, layers = model, len(model.blocks)
        self.caches = [entries(SLOTS) for _ in range(layers)]
        self.banks = [self._bank(entries(PLACES), tokens) for _ in range(layers)] if has_bank else None
        self.context = {
            "seq_lens": torch.tensor([CHUNK * tokens]),
            "grid_sizes": torch.tensor([[CHUNK, *options.grid]]),
            "freqs": wan_freqs(options.dim // options.heads),
            "block_mask": None,
            "current_start": SLOTS * tokens,
        }

    def _bank(self, bank: dict, tokens: int) -> dict:
        for name in ("global_end_index", "local_end_index"):  # as many as the chunks before this one
            bank[name].fill_(SLOTS // CHUNK * tokens)
        return bank | {f"{name}_new": bank[name][:, :tokens].clone() for name in ("k", "v")}

    def run(self, x: Tensor) -> Tensor:
        return self.model(x, self.caches, self.banks, update_cache=False, **self.context)


def wan_freqs(head_dim: int, positions: int = 64) -> Tensor:
    """[positions, head_dim / 2]: the turns at (p, p, p)."""
    table = rotation_table(head_dim, positions, (positions, positions), 0, torch.device("cpu"))
    return table[:: positions**2 + positions + 1, 0]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--module", default=OWN, help="FILE.py:Class of a self-attention that defers its update")
    parser.add_argument("--grid", type=int, nargs=2, default=(30, 52), help="rows and columns of tokens")
    parser.add_argument("--dim", type=int, default=1536)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sma", action="store_true", help="three frames of sink and bank per head")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    options = parser.parse_args()
    dtype, tokens = getattr(torch, options.dtype), options.grid[0] * options.grid[1]
    torch.manual_seed(0)
    kind = load(options.module)
    has_bank = "kv_bank" in inspect.signature(kind.forward).parameters
    own = Layers([built(kind, options.dim, options.heads, tokens, options.sma) for _ in range(options.layers)]).to(
        dtype
    )
    patched = copy.deepcopy(own)
    patch(patched)
    sides = [Side(own, options, has_bank, dtype), Side(patched, options, has_bank, dtype)]
    x = torch.randn(1, CHUNK * tokens, options.dim).to(dtype)
    for _ in range(3):  # the self-check looks at the first calls
        theirs, ours = (side.run(x) for side in sides)
    error = ((ours - theirs).double().norm() / theirs.double().norm()).item()
    times: list[list[float]] = [[], []]
    for number in range(options.rounds):
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            began = time.perf_counter()
            sides[which].run(x)
            times[which].append(time.perf_counter() - began)
    medians, least = [statistics.median(t) for t in times], [min(t) for t in times]
    sizes = f"{options.layers} layers of {options.heads} heads, {tokens} tokens per frame"
    print(f"{kind.__name__}, {sizes}, {options.dtype},")
    print(f"{'three frames per head' if options.sma else 'dense'}; relative difference {error:.1e}")
    for name, figures in (("median", medians), ("least", least)):
        own_ms, ours_ms = (1000 * figure for figure in figures)
        print(f"{name:<7} own {own_ms:9.3f} ms   patched {ours_ms:9.3f} ms   {own_ms / ours_ms:.2f}x")


if __name__ == "__main__":
    main()

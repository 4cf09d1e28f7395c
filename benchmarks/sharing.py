"""One story over N GPUs on paper: what the processes exchange, and from which interconnect on it pays.

    python -m benchmarks.sharing > benchmarks/results/sharing.md

Bytes are exact (tests/benchmarks/test_sharing.py counts them). Times are simulated: arithmetic at an assumed rate,
bytes at an assumed bandwidth, nothing overlapped. Nothing here was measured on GPUs; where there are some,

    torchrun --nproc-per-node 2 -m benchmarks.sharing 1.3B

measures a chunk and the exchange of a layer, with random weights (without torchrun: of one GPU).
"""

from __future__ import annotations

import sys
import time
from typing import NamedTuple

FRAMES, TOKENS = 3, 4680  # of a chunk at 480 x 832
SEEN = 15  # latent frames that attention sees when the memory is full
PASSES = 5  # of a chunk: four denoising steps and the clean pass
TEXT = 512
BYTES = 2  # bfloat16
RATE = 4e14  # assumed operations per second of a GPU, the whole layer taken together
LAUNCHES = 60e-6  # assumed seconds of a layer that no number of GPUs shortens
WAIT = 15e-6  # assumed seconds of an exchange of nothing


class Size(NamedTuple):
    """A published transformer."""

    name: str
    layers: int
    heads: int
    hidden: int


class Link(NamedTuple):
    """What connects the GPUs. bandwidth: assumed bytes per second that one GPU sends in an all-to-all."""

    name: str
    bandwidth: float


SIZES = (Size("1.3B", 30, 12, 8960), Size("14B", 40, 40, 13824))
LINKS = (Link("NVLink 4, 300 GB/s", 3e11), Link("PCIe 5, 40 GB/s", 4e10), Link("100 GbE, 10 GB/s", 1e10))


def width(size: Size) -> int:
    return size.heads * 128


def sent(size: Size, processes: int, tokens: int = TOKENS) -> int:
    """Bytes that a process sends to others in one layer of one call: queries, keys and values of its tokens to those
    with their heads, and what its heads found to those with the tokens."""
    return 4 * tokens * width(size) * BYTES * (processes - 1) // processes**2


def sent_beside(size: Size, processes: int) -> tuple[int, int]:
    """Bytes that a process sends in a call (its part of the flow, 64 numbers a token) and before a chunk (mean keys of
    its heads of the bank and of the frame that leaves the window, float32)."""
    flow = TOKENS * 64 * BYTES * (processes - 1) // processes
    means = 4 * 2 * size.layers * width(size) * 4 * (processes - 1) // processes
    return flow, means


def arithmetic(size: Size) -> float:
    """Seconds of one layer of one call on one GPU."""
    wide = width(size)
    linear = 12 * TOKENS * wide * wide + 4 * TOKENS * wide * size.hidden
    attention = 4 * TOKENS * wide * (SEEN * TOKENS // FRAMES + TEXT)
    return (linear + attention) / RATE


def chunk(size: Size, processes: int, bandwidth: float) -> float:
    """Seconds of a chunk's calls, the decoder not counted."""
    layer = arithmetic(size) / processes + LAUNCHES
    if processes == 1:
        return PASSES * size.layers * layer
    flow, means = sent_beside(size, processes)
    layer += sent(size, processes) / bandwidth + 2 * WAIT
    return PASSES * (size.layers * layer + flow / bandwidth + WAIT) + means / bandwidth + 2 * WAIT


def least_bandwidth(size: Size, processes: int) -> float:
    """Bytes per second from which a chunk takes less time than on one GPU."""
    flow, means = sent_beside(size, processes)
    moved = PASSES * (size.layers * sent(size, processes) + flow) + means
    return moved / (chunk(size, 1, 1.0) - chunk(size, processes, float("inf")))


def numbers(size: Size) -> list[int]:
    return [n for n in range(2, size.heads + 1) if size.heads % n == 0 and TOKENS % n == 0]


def tables() -> str:
    """Markdown."""
    lines = [
        "# One story over N GPUs, simulated",
        "",
        f"480 x 832, {FRAMES} latent frames a chunk, {PASSES} calls, {SEEN} frames seen, bfloat16. Assumed: "
        f"{RATE / 1e12:.0f} TFLOP/s a GPU, {LAUNCHES * 1e6:.0f} us of a layer that do not shrink, {WAIT * 1e6:.0f} us "
        "for an exchange of nothing; no overlap; the decoder is not in it. Written by `python -m benchmarks.sharing`; "
        "nothing was measured.",
        "",
    ]
    for size in SIZES:
        lines += [
            f"## {size.name}: {size.layers} layers, {size.heads} heads",
            "",
            "| GPUs | sent per layer and call | per call | per chunk | pays from "
            + "".join(f"| {link.name} " for link in LINKS)
            + "|",
            "|" + "---|" * (5 + len(LINKS)),
            f"| 1 | | | | {f'| {chunk(size, 1, 1.0):.3f} s ' * len(LINKS)}|",
        ]
        for n in numbers(size):
            flow, means = sent_beside(size, n)
            call = size.layers * sent(size, n) + flow
            row = [f"{sent(size, n) / 1e6:.1f} MB", f"{call / 1e6:,.0f} MB", f"{(PASSES * call + means) / 1e6:,.0f} MB"]
            row += [f"{least_bandwidth(size, n) / 1e9:.1f} GB/s"]
            for link in LINKS:
                seconds = chunk(size, n, link.bandwidth)
                row.append(f"{seconds:.3f} s, x {chunk(size, 1, 1.0) / seconds:.2f}")
            lines.append(f"| {n} | {' | '.join(row)} |")
        lines.append("")
    return "\n".join(lines)


def measure(size: Size, ranks, *, head_dim: int = 128, latents: tuple[int, int] = (60, 104)) -> dict[str, float]:
    """Median seconds of a chunk when the memory is full and of the exchange of a layer (0 for one process).

    Args:
        size: of the transformer, whose weights are random.
        ranks: `memflow.parallel.Alone` or Ranks; all processes call this.
        head_dim: channels of a head.
        latents: rows and columns.
    """
    import torch
    from diffusers import WanTransformer3DModel

    from memflow.memory import MemoryConfig
    from memflow.models.wan.adapter import WanModel
    from memflow.models.wan.attention import share
    from memflow.stream.chunks import ChunkDriver

    on_gpu = torch.cuda.is_available()
    device, dtype = torch.device("cuda" if on_gpu else "cpu"), torch.bfloat16 if on_gpu else torch.float32
    torch.manual_seed(0)
    sizes = {"num_attention_heads": size.heads, "attention_head_dim": head_dim, "num_layers": size.layers}
    with device:
        transformer = WanTransformer3DModel(**sizes, ffn_dim=size.hidden).to(dtype).eval()
        noise, text = torch.randn(1, 16, FRAMES, *latents), torch.randn(1, TEXT, transformer.config.text_dim)
        tokens = FRAMES * latents[0] * latents[1] // 4 // ranks.size
        states = torch.randn(3, 1, tokens, size.heads, head_dim).to(dtype).unbind()
    if ranks.size > 1:
        share(transformer, ranks)
    driver = ChunkDriver(WanModel(transformer), MemoryConfig())
    driver.prompt(text)

    def chunk() -> None:
        for timestep in (1000.0, 937.5, 833.3, 625.0):
            driver.denoise(noise, timestep)
        driver.keep(noise)
        driver.settle()

    def exchange() -> None:
        ranks.to_tokens(ranks.to_heads(*states)[0])

    def seconds(run) -> float:
        begin = time.perf_counter()
        run()
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    def median(run, warm: int, times: int) -> float:
        return sorted([seconds(run) for _ in range(warm + times)][warm:])[times // 2]

    return {"chunk": median(chunk, 8, 7), "exchange": median(exchange, 5, 21) if ranks.size > 1 else 0.0}


def main() -> None:
    """Print the tables, or what was measured of the size that is named."""
    if len(sys.argv) == 1:
        print(tables(), end="")
        return
    from memflow.parallel import together

    size = next(size for size in SIZES if size.name == sys.argv[1])
    with together(None) as ranks:
        found = measure(size, ranks)
        if ranks.first:
            sending = sent(size, ranks.size) / found["exchange"] / 1e9 if ranks.size > 1 else 0.0
            print(
                f"{size.name}, N = {ranks.size}: chunk {found['chunk']:.3f} s, exchange of a layer "
                f"{found['exchange'] * 1e6:.0f} us ({sending:.1f} GB/s sent by each)"
            )


if __name__ == "__main__":
    main()

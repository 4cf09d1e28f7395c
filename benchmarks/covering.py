"""What a choice of frames that covers the prompt costs on a CPU at the size of the 1.3B model, beside a chunk.

    python -m benchmarks.covering -o benchmarks/results/cpu-covering.md

One thread, its CPU time: the scores of all layers for all held frames, as a new prompt needs them, the choice, and one
call of attention, of which a chunk makes 150. What else a chunk does is left out.
"""

from memflow_bench.pinning import pin_threads

pin_threads()

import argparse  # noqa: E402 (torch after the threads are pinned)
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402
from functools import partial  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402

from memflow_bench import environment  # noqa: E402
from memflow_kernels import cover_frames, frame_means, memory_attention, prompt_relevance  # noqa: E402
from memflow_kernels.testing import states  # noqa: E402

from .gpu_calls import CANDIDATES, CHUNK, FRAMES, MODEL, PASSES, TOP_K  # noqa: E402

HELD, ROUNDS = (24, 200), 5


def least(run: Callable[[], object], rounds: int = ROUNDS) -> float:
    taken = []
    for _ in range(rounds):
        begin = time.thread_time()
        run()
        taken.append(time.thread_time() - begin)
    return min(taken)


def attention(dtype: torch.dtype) -> float:
    made = lambda frames, seed: states(  # noqa: E731
        1, frames * MODEL.tokens, MODEL.heads, MODEL.head_dim, dtype=dtype, seed=seed, layout="heads_first"
    )
    query, key, value = made(CHUNK, 0), made(FRAMES, 1), made(FRAMES, 2)
    means = frame_means(key[:, : CANDIDATES * MODEL.tokens], MODEL.tokens)
    options = {"tokens_per_frame": MODEL.tokens, "candidate_frames": CANDIDATES, "frame_mean": means}
    return least(lambda: memory_attention(query, key, value, top_k=TOP_K, **options), rounds=2)


@torch.no_grad()
def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("-o", "--output", type=Path, required=True, help="table to write (.md)")
    output = options.parse_args().output
    torch.set_num_threads(1)
    facts = environment.record(torch.device("cpu"))
    shape = MODEL.heads, MODEL.head_dim
    text = states(MODEL.layers, MODEL.text, *shape, dtype=torch.bfloat16)
    chunk = {dtype: PASSES * MODEL.layers * attention(dtype) for dtype in (torch.float32, torch.bfloat16)}
    lines = [
        f"`python -m benchmarks.covering -o {output}`",
        "",
        f"{facts['cpu']}, {facts['cpu_capability']}, one thread; torch {facts['torch']}, commit {facts['commit']}; "
        f"load average {facts['load_average']}. {MODEL.layers} layers of {shape[0]} x {shape[1]}, {MODEL.text} text "
        f"tokens, bfloat16; {CANDIDATES} of the held frames are chosen. The attention of a chunk, top {TOP_K} of "
        f"{CANDIDATES} and {FRAMES - CANDIDATES} more in {PASSES * MODEL.layers} calls, takes "
        f"{chunk[torch.float32]:.0f} s in float32 and {chunk[torch.bfloat16]:.0f} s in bfloat16.",
        "",
        "| held frames | scores, all layers, ms | a new frame's, ms | choice, ms | all, of a chunk's attention |",
        "|---|---|---|---|---|",
    ]
    for held in HELD:
        means = states(MODEL.layers, held, *shape, seed=1)
        by_layer = prompt_relevance(text, frame_mean=means, aggregate="token")
        scores = by_layer[1:].mean(0, keepdim=True)
        row = scores, torch.full((1, MODEL.text), 1 / MODEL.text), CANDIDATES, scores.mean(1)
        score = partial(prompt_relevance, text, aggregate="token")
        whole, one = (least(partial(score, frame_mean=x)) for x in (means, means[:, :1]))
        choice = least(partial(cover_frames, *row), 20)
        share = (whole + choice) / min(chunk.values())
        lines.append(f"| {held} | {whole * 1e3:.0f} | {one * 1e3:.1f} | {choice * 1e3:.2f} | {share:.3%} |")
    output.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

"""What one call of an op costs at sizes at which the arithmetic hardly counts, with torch's own attention as the floor.

    python -m benchmarks.overhead -o benchmarks/results/cpu-overhead.json [--before EARLIER.json]

writes the numbers and, beside them, a table (.md). One thread. Every round times all calls of a mode in turns; a number
is the median over the rounds, the least one stands beside it. --before: an earlier result, shown next to the new one.
"""

from memflow_bench.pinning import pin_threads

pin_threads()

import argparse  # noqa: E402 (torch after the threads are pinned)
import json  # noqa: E402
import statistics  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402
from contextlib import nullcontext  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import memflow_kernels as mk  # noqa: E402
from memflow_bench import environment  # noqa: E402
from memflow_kernels.testing import states  # noqa: E402

ROUNDS, CALLS = 25, 40
MODES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "grad": nullcontext}
# name: (frames, tokens per frame, queries, heads, head size, candidates, top_k)
SIZES = {"tiny": (3, 4, 8, 2, 16, 2, 1), "story": (15, 24, 72, 4, 32, 6, 3)}
CHOICES = ("select_frames", "cover_frames")
WRITES = ("qk_norm_rope_write", "replace_frame")  # in place: without gradients only


def calls(size: str, grad: bool) -> dict[str, Callable[[], object]]:
    """The calls of one size; with `grad` each runs forward and backward."""
    frames, tokens, queries, heads, dim, candidates, top_k = SIZES[size]
    # queries as linear layers leave them, keys and values as a pool has them
    query = states(1, queries, heads, dim).requires_grad_(grad)
    key, value = (
        states(1, frames * tokens, heads, dim, layout="heads_first", seed=s).requires_grad_(grad) for s in (1, 2)
    )
    means = mk.frame_means(key.detach(), tokens)
    candidate_means, mean_query = means[:, :candidates], query.detach().float().mean(1)
    scores = mk.prompt_relevance(query.detach(), frame_mean=means, aggregate="token")
    weights = torch.full((1, queries), 1 / queries)
    table = mk.select_frames(query.detach(), candidate_means, top_k)
    weight = torch.ones(heads * dim, requires_grad=grad)
    pool = mk.Pool.zeros(1, frames, tokens, heads, dim)
    slots, slot, source = (torch.tensor(x, dtype=torch.int32) for x in ([0], [0], [1]))
    rotated = {"weight_q": weight, "weight_k": weight, "eps": 1e-6, "grid": (2, tokens // 2), "start_frame": 3}
    first = key[:, :tokens]
    lse = torch.zeros(1, heads, queries)
    seen = (frames - candidates + top_k) * tokens
    attend = {"tokens_per_frame": tokens}
    chosen = {**attend, "candidate_frames": candidates}

    def sdpa(keys: int) -> torch.Tensor:
        states_ = (query, key[:, :keys], value[:, :keys])
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in states_)).transpose(1, 2)

    found = {
        "SDPA, all keys (floor)": lambda: sdpa(frames * tokens),
        "memory_attention, dense": lambda: mk.memory_attention(query, key, value, **attend),
        "SDPA, as many keys as top_k (floor)": lambda: sdpa(seen),
        "memory_attention, top_k": lambda: mk.memory_attention(query, key, value, **chosen, top_k=top_k),
        "memory_attention, top_k, means known": lambda: mk.memory_attention(
            query, key, value, **chosen, top_k=top_k, frame_mean=candidate_means, query_mean=mean_query
        ),
        "memory_attention, table": lambda: mk.memory_attention(query, key, value, **chosen, frame_table=table),
        "merge_attention": lambda: mk.merge_attention(query, lse, query, lse)[0],
        "frame_means": lambda: mk.frame_means(key, tokens),
        "select_frames": lambda: mk.select_frames(query, candidate_means, top_k),
        "prompt_relevance, mean": lambda: mk.prompt_relevance(query, frame_mean=means),
        "prompt_relevance, softmax": lambda: mk.prompt_relevance(
            query, key, tokens_per_frame=tokens, aggregate="softmax"
        ),
        "prompt_relevance, token": lambda: mk.prompt_relevance(query, frame_mean=means, aggregate="token"),
        "cover_frames": lambda: mk.cover_frames(scores, weights, candidates, scores.mean(1)),
        "qk_norm_rope": lambda: mk.qk_norm_rope(first, first, **rotated)[0],
        "qk_norm_rope_write": lambda: mk.qk_norm_rope_write(first, first, first, **rotated, pool=pool, slots=slots),
        "replace_frame": lambda: mk.replace_frame(pool, slot, source),
    }
    if not grad:
        return found
    upstream = {}

    def both(name: str, forward: Callable) -> None:
        out = forward()
        if name not in upstream:
            upstream[name] = torch.ones_like(out)
        leaves = [x for x in (query, key, value, weight) if x.requires_grad]
        torch.autograd.grad(out, leaves, upstream[name], allow_unused=True)

    differentiable = {n: f for n, f in found.items() if n not in (*WRITES, *CHOICES)}
    return {name: lambda name=name, run=run: both(name, run) for name, run in differentiable.items()}


def measure() -> list[dict]:
    rows = []
    for size in SIZES:
        for mode, context in MODES.items():
            with context():
                runs = calls(size, mode == "grad")
                times = {name: [] for name in runs}
                for _ in range(ROUNDS):
                    for name, run in runs.items():
                        begin = time.thread_time()
                        for _ in range(CALLS):
                            run()
                        times[name].append((time.thread_time() - begin) / CALLS * 1e6)
            for name, taken in times.items():
                taken = taken[2:]  # the first rounds warm up
                rows.append({"size": size, "mode": mode, "call": name, "median_us": statistics.median(taken)})
                rows[-1]["least_us"] = min(taken)
            print(size, mode, flush=True)
    return rows


def table(result: dict, before: dict | None, command: str) -> str:
    """The result as Markdown: microseconds per call, median (least)."""
    earlier = {(r["size"], r["mode"], r["call"]): r for r in before["rows"]} if before else {}
    lines = ["# Cost of a call, in microseconds", "", f"`{command}`", "", f"{result['machine']}", ""]
    lines += [f"{name}: frames, tokens per frame, queries, heads, head size, candidates, top_k = {size}  "
              for name, size in SIZES.items()]  # fmt: skip
    lines += ["", "Median (least). grad: forward and backward.", ""]
    for size in SIZES:
        heads = [f"{mode}{when}" for mode in MODES for when in ((" before", " after") if before else ("",))]
        lines += [f"| {size} | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
        found = {(r["mode"], r["call"]): r for r in result["rows"] if r["size"] == size}
        for name in dict.fromkeys(call for _, call in found):
            cells = []
            for mode in MODES:
                pair = [earlier.get((size, mode, name))] if before else []
                for row in (*pair, found.get((mode, name))):
                    cells.append(f"{row['median_us']:.0f} ({row['least_us']:.0f})" if row else "")
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True, help="result file (JSON); the table lies beside it")
    parser.add_argument("--before", type=Path, help="an earlier result to compare with")
    options = parser.parse_args()
    torch.set_num_threads(1)
    facts = environment.record(torch.device("cpu"))
    machine = f"{facts.get('cpu', '')}, torch {torch.__version__}, one thread, commit {facts.get('commit', 'unknown')}"
    result = {"command": " ".join(["python -m benchmarks.overhead", *sys.argv[1:]]), "machine": machine}
    result["rows"] = measure()
    before = json.loads(options.before.read_text()) if options.before else None
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    options.output.with_suffix(".md").write_text(table(result, before, result["command"]))


if __name__ == "__main__":
    main()

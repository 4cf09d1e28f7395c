"""Ways to attend to chosen frames on a CPU, beside a user's own gather and torch's attention.

    python -m benchmarks.chosen_forward -o benchmarks/results/cpu-chosen-forward.md

One thread, its CPU time, in rounds of one call each in turns. The choice is given: it is the same for all.
"""

from memflow_bench.pinning import pin_threads

pin_threads()

import argparse  # noqa: E402 (torch after the threads are pinned)
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from memflow_bench import environment  # noqa: E402
from memflow_kernels import frame_means, memory_attention, select_frames  # noqa: E402
from memflow_kernels.reference.attend import attend  # noqa: E402
from memflow_kernels.reference.merge import merge_attention  # noqa: E402
from memflow_kernels.testing import states  # noqa: E402

FRAMES, CANDIDATES, TOP_K, TOKENS, HEADS, DIM, ROUNDS = 15, 6, 3, 390, 3, 128, 15


def ways(dtype: torch.dtype) -> dict[str, Callable[[], torch.Tensor]]:
    """Calls that give the same [1, Lq, H, D], but for the last two, which are floors."""
    query, key, value = (
        states(1, n * TOKENS, HEADS, DIM, dtype=dtype, seed=s) for s, n in enumerate((3, FRAMES, FRAMES))
    )
    first = CANDIDATES * TOKENS
    table = select_frames(query, frame_means(key[:, :first], TOKENS), TOP_K)
    places = table.long().permute(0, 2, 1)[:, :, None, :, None].expand(-1, -1, TOKENS, -1, DIM)

    def torchs(keys, values):
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, keys, values))).transpose(1, 2)

    def gathered(x):
        frames = x.unflatten(1, (FRAMES, TOKENS))
        return torch.cat([frames[:, :CANDIDATES].gather(1, places), frames[:, CANDIDATES:]], 1).flatten(1, 2)

    def pieces(x):
        frames = x.unflatten(1, (FRAMES, TOKENS))
        found = [[*(frames[0, f, :, h] for f in row), x[0, first:, h]] for h, row in enumerate(table[0].tolist())]
        return torch.cat([piece for head in found for piece in head]).view(1, HEADS, -1, DIM).transpose(1, 2)

    def merged():
        chosen = [
            x.unflatten(1, (FRAMES, TOKENS))[:, :CANDIDATES].gather(1, places).flatten(1, 2) for x in (key, value)
        ]
        parts = [attend(query, *chosen, DIM**-0.5), attend(query, key[:, first:], value[:, first:], DIM**-0.5)]
        return merge_attention(*parts[0], *parts[1])[0]

    def head_by_head():
        outs = []
        for head, row in enumerate(table[0].tolist()):
            runs: list[list[int]] = []
            for frame in [*row, *range(CANDIDATES, FRAMES)]:
                if runs and runs[-1][1] == frame:
                    runs[-1][1] = frame + 1
                else:
                    runs.append([frame, frame + 1])
            own = [x[:, :, head : head + 1] for x in (query, key, value)]
            spans = [slice(a * TOKENS, b * TOKENS) for a, b in runs]
            parts = [attend(own[0], own[1][:, span], own[2][:, span], DIM**-0.5) for span in spans]
            out = parts[0]
            for part in parts[1:]:
                out = merge_attention(*out, *part)
            outs.append(out[0])
        return torch.cat(outs, 2)

    def blocks():
        """For every head its query and each frame that it sees, keys and values, where they lie."""
        for head, row in enumerate(table[0].tolist()):
            spans = [slice(f * TOKENS, (f + 1) * TOKENS) for f in [*row, *range(CANDIDATES, FRAMES)]]
            yield query[0, :, head], [(key[0, span, head], value[0, span, head]) for span in spans]

    def frame_by_frame():
        outs = []
        for own, frames in blocks():
            top, mass, out = torch.full((len(own), 1), -torch.inf), 0.0, 0.0
            for keys, values in frames:
                logits = (own @ keys.T).float().mul_(DIM**-0.5)
                new_top = torch.maximum(top, logits.amax(1, keepdim=True))
                share, shrink = logits.sub_(new_top).exp_(), (top - new_top).exp_()
                mass = mass * shrink + share.sum(1, keepdim=True)
                out, top = out * shrink + (share.to(dtype) @ values).float(), new_top
            outs.append((out / mass).to(dtype))
        return torch.stack(outs, 1).unsqueeze(0)

    def products():
        logits, out = (query.new_zeros(query.shape[1], size) for size in (TOKENS, DIM))
        for own, frames in blocks():
            for keys, values in frames:
                out.addmm_(torch.mm(own, keys.T, out=logits), values, beta=0.5)
        return out

    options = {"tokens_per_frame": TOKENS, "candidate_frames": CANDIDATES, "frame_table": table}
    there = [x[:, (CANDIDATES - TOP_K) * TOKENS :] for x in (key, value)]
    return {
        "a user's gather, and torch's attention": lambda: torchs(gathered(key), gathered(value)),
        "memory_attention": lambda: memory_attention(query, key, value, **options),
        "chosen frames gathered, the rest in place, merged": merged,
        "every head alone, its runs of frames in place": head_by_head,
        "everything copied once, one call": lambda: torchs(pieces(key), pieces(value)),
        "frame by frame where it lies, softmax in plain torch": frame_by_frame,
        "torch's attention on as many keys that lie there already": lambda: torchs(*there),
        "the two matrix products alone, without a softmax": products,
    }


def measure(dtype: torch.dtype) -> dict[str, list[float]]:
    calls = ways(dtype)
    *same, _, _ = [call() for call in calls.values()]
    for name, result in zip(calls, same, strict=False):
        torch.testing.assert_close(result, same[0], rtol=0, atol=1e-2 if dtype == torch.bfloat16 else 1e-5, msg=name)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            begin = time.thread_time()
            call()
            samples[name].append(time.thread_time() - begin)
    return samples


@torch.no_grad()
def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("-o", "--output", type=Path, required=True, help="table to write (.md)")
    output = options.parse_args().output
    torch.set_num_threads(1)
    facts = environment.record(torch.device("cpu"))
    measured = {dtype: measure(dtype) for dtype in (torch.float32, torch.bfloat16)}
    names = list(measured[torch.float32])
    lines = [
        f"`python -m benchmarks.chosen_forward -o {output}`",
        "",
        f"{facts['cpu']}, {facts['cpu_capability']}; torch {facts['torch']}, commit {facts['commit']}; load "
        f"average {facts['load_average']}. Least (median) CPU time of {ROUNDS} rounds in ms, and how many times "
        "faster than the first row by the least.",
        "",
        "| | float32 | | bfloat16 | |",
        "|---|---|---|---|---|",
    ]
    for name in names:
        cells = []
        for samples in measured.values():
            base, own = sorted(samples[names[0]]), sorted(samples[name])
            cells += [f"{own[0] * 1e3:.1f} ({own[len(own) // 2] * 1e3:.1f})", f"{base[0] / own[0]:.2f}x"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    output.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

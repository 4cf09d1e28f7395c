"""The speed table of the kernels at the published size, beside dense attention by others and the reference path.

Every result is compared with the `torch` backend first: a wrong one gets no time. Calls are captured in CUDA graphs
where they can be, and timed in turns on cold caches.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.timing import captured, in_turns, spread
from memflow_kernels import (
    Pool,
    frame_means,
    memory_attention,
    prompt_relevance,
    qk_norm_rope_write,
    replace_frame,
    select_frames,
    use_backend,
)
from memflow_kernels.testing import relative_error, states


class Size(NamedTuple):
    """heads x head_dim, tokens = rows * cols per frame, a chunk of 3 frames, 6 candidates and 9 more frames."""

    heads: int
    head_dim: int
    rows: int
    cols: int
    layers: int
    text: int
    dtype: torch.dtype

    @property
    def tokens(self) -> int:
        return self.rows * self.cols


MODEL = Size(heads=12, head_dim=128, rows=30, cols=52, layers=30, text=512, dtype=torch.bfloat16)
TINY = Size(heads=2, head_dim=16, rows=2, cols=3, layers=2, text=5, dtype=torch.float32)
CHUNK, CANDIDATES, FRAMES, TOP_K, PASSES = 3, 6, 15, 3, 5


class Call(NamedTuple):
    """group: calls compared with each other; run: returns the result that is checked; work: FLOPs or bytes."""

    group: str
    name: str
    run: Callable[[], Tensor]
    expected: Tensor
    work: int
    unit: str  # "TFLOP/s" or "GB/s"


# What a row is called -> the backend that it shows. The promised numbers are those of "ours", what a user gets.
Ours = dict[str, str]


def attention_calls(size: Size, device: torch.device, ours: Ours) -> list[Call]:
    made = partial(states, 1, heads=size.heads, head_dim=size.head_dim, dtype=size.dtype, device=device)
    query, key, value = (made(frames * size.tokens, seed=seed) for seed, frames in enumerate((CHUNK, FRAMES, FRAMES)))
    means = frame_means(key[:, : CANDIDATES * size.tokens], size.tokens)
    options = {"tokens_per_frame": size.tokens, "candidate_frames": CANDIDATES, "frame_mean": means}

    def backend(name: str, top_k: int | None) -> Tensor:
        with use_backend(name):
            return memory_attention(query, key, value, top_k=top_k, **options)

    def dense(kernel: SDPBackend | None) -> Tensor:
        heads_first = (x.transpose(1, 2) for x in (query, key, value))
        if kernel is None:
            return scaled_dot_product_attention(*heads_first).transpose(1, 2)
        with sdpa_kernel(kernel):
            return scaled_dot_product_attention(*heads_first).transpose(1, 2)

    top, all_ = (backend("torch", top_k) for top_k in (TOP_K, None))
    per_frame = 4 * query.shape[1] * size.tokens * size.heads * size.head_dim
    few, many = per_frame * (FRAMES - CANDIDATES + TOP_K), per_frame * FRAMES
    group = "attention"
    calls = [
        Call(group, "reference path, top 3 of 6 + 9", partial(backend, "torch", TOP_K), top, few, "TFLOP/s"),
    ]
    for label, name in ours.items():
        calls.append(Call(group, f"{label}, top 3 of 6 + 9", partial(backend, name, TOP_K), top, few, "TFLOP/s"))
        calls.append(Call(group, f"{label}, all 15", partial(backend, name, None), all_, many, "TFLOP/s"))
    if device.type == "cuda":
        for kernel, label in ((SDPBackend.CUDNN_ATTENTION, "cuDNN"), (SDPBackend.FLASH_ATTENTION, "flash")):
            calls.append(Call(group, f"SDPA {label}, all 15", partial(dense, kernel), all_, many, "TFLOP/s"))
        from torch.nn.attention.flex_attention import flex_attention

        flex = torch.compile(flex_attention, dynamic=False)
        heads_first = [x.transpose(1, 2) for x in (query, key, value)]
        run = lambda: flex(*heads_first).transpose(1, 2)  # noqa: E731
        calls.append(Call(group, "FlexAttention, all 15", run, all_, many, "TFLOP/s"))
    else:
        calls.append(Call(group, "SDPA, all 15", partial(dense, None), all_, many, "TFLOP/s"))
    return calls


def write_calls(size: Size, device: torch.device, ours: Ours) -> list[Call]:
    shape = (size.heads, size.head_dim)
    query, key, value = (
        states(1, CHUNK * size.tokens, *shape, dtype=size.dtype, device=device, seed=seed) for seed in (3, 4, 5)
    )
    weight = states(1, 1, *shape, dtype=size.dtype, device=device, seed=6, mean=1.0).flatten()
    pool = Pool.zeros(1, FRAMES, size.tokens, *shape, dtype=size.dtype, device=device)
    slots = torch.arange(FRAMES - CHUNK, FRAMES, dtype=torch.int32, device=device)
    start = torch.tensor(1000, device=device)
    options = {"weight_q": weight, "weight_k": weight, "eps": 1e-6, "grid": (size.rows, size.cols)}

    def write(name: str) -> Tensor:
        with use_backend(name):
            new = qk_norm_rope_write(query, key, value, start_frame=start, pool=pool, slots=slots, **options)
        return torch.cat([new, pool.key[:, -new.shape[1] :], pool.value[:, -new.shape[1] :]]) if checking else new

    def means(name: str) -> Tensor:
        with use_backend(name):
            return frame_means(long_key, size.tokens)

    long_key = states(1, FRAMES * size.tokens, *shape, dtype=size.dtype, device=device, seed=7)
    checking = True
    expected = write("torch")
    calls = []
    for label, name in {**ours, "reference path": "torch"}.items():
        checked = relative_error(write(name), expected)
        if checked > tolerance(size.dtype):
            raise AssertionError(f"write, {label}: the pool is wrong, relative error {checked:.2g}")
        calls.append(Call("write", label, partial(write, name), expected[:1], 6 * query.nbytes, "GB/s"))
        calls.append(Call("frame_means", label, partial(means, name), means("torch"), long_key.nbytes, "GB/s"))
    checking = False
    return calls


def update_calls(size: Size, device: torch.device, ours: Ours) -> list[Call]:
    """What a chunk costs beside its passes: relevance and replacement for all layers at once, and one selection."""
    shape = (size.heads, size.head_dim)
    pool = Pool.zeros(size.layers, FRAMES, size.tokens, *shape, dtype=size.dtype, device=device)
    pool.key.normal_()
    pool.value.normal_()
    pool.frame_mean.copy_(frame_means(pool.key, size.tokens))
    text = states(size.layers, size.text, *shape, dtype=size.dtype, device=device, seed=8)
    query = states(1, CHUNK * size.tokens, *shape, dtype=size.dtype, device=device, seed=9)
    bank = pool.key[:, : CANDIDATES * size.tokens]
    # the newest frame goes over the one before it: the bank that the other calls read stays as it is
    source = torch.full((size.layers,), FRAMES - 1, dtype=torch.int32, device=device)

    def relevance(name: str, aggregate: str) -> Tensor:
        with use_backend(name):
            if aggregate == "mean":
                return prompt_relevance(text, frame_mean=pool.frame_mean[:, :CANDIDATES])
            return prompt_relevance(text, bank, tokens_per_frame=size.tokens, aggregate="softmax")

    def selection(name: str) -> Tensor:
        with use_backend(name):
            return select_frames(query, pool.frame_mean[:1, :CANDIDATES], TOP_K)

    def replacement(name: str) -> Tensor:
        with use_backend(name):
            replace_frame(pool, source - 1, source)
        return pool.frame_mean[:, FRAMES - 2]

    runs = {
        "relevance mean": (partial(relevance, aggregate="mean"), text.nbytes),
        "relevance softmax": (partial(relevance, aggregate="softmax"), text.nbytes + bank.nbytes),
        "selection": (selection, query.nbytes),
        "replacement": (replacement, 4 * bank.nbytes // CANDIDATES),
    }
    return [
        Call(group, label, partial(run, name), run("torch"), work, "GB/s")
        for group, (run, work) in runs.items()
        for label, name in {**ours, "reference path": "torch"}.items()
    ]


def tolerance(dtype: torch.dtype) -> float:
    """Two results that were each rounded a few times."""
    return 1e-5 if dtype == torch.float32 else 6 * torch.finfo(dtype).eps


def measure(device: torch.device, size: Size, ours: Ours, budget: float = 4.0):
    """rows (one dictionary per call), ceilings of this machine, and what was wrong (nothing, one hopes)."""
    ceilings = measure_ceilings(device, size, budget)
    groups: dict[str, list[Call]] = {}
    for make in (attention_calls, write_calls, update_calls):
        for call in make(size, device, ours):
            groups.setdefault(call.group, []).append(call)
    rows, wrong = [], []
    for calls in groups.values():
        runs = {}
        for call in calls:
            error = relative_error(call.run(), call.expected)
            if not error <= tolerance(size.dtype):
                wrong.append(f"{call.group}, {call.name}: relative error {error:.2g}")
                continue
            runs[call.name] = call.run
            if device.type == "cuda":
                try:
                    runs[call.name] = captured(call.run, device)
                except RuntimeError as error:
                    print(f"{call.group}, {call.name}: timed without a CUDA graph ({error})")
        samples: dict[str, list[float]] = {name: [] for name in runs}
        for turn in in_turns(runs, device, budget=budget) if runs else ():
            for name, seconds in turn.items():
                samples[name].append(seconds)
        for call in calls:
            if call.name in runs:
                times = spread(samples[call.name])
                rate = call.work / times["median"] / (1e12 if call.unit == "TFLOP/s" else 1e9)
                row = {"group": call.group, "name": call.name, "milliseconds": {k: 1e3 * v for k, v in times.items()}}
                rows.append(row | {"rate": rate, "unit": call.unit, "share_of_ceiling": rate / ceilings[call.unit]})
    return rows, ceilings, wrong


def measure_ceilings(device: torch.device, size: Size, budget: float) -> dict[str, float]:
    """Best matrix product and best copy of this machine, in the units of the rows; a copy counts both directions."""
    edge, length = (8192, 2**30) if device.type == "cuda" else (256, 2**22)
    a, b = (torch.randn(edge, edge, dtype=size.dtype, device=device) for _ in range(2))
    source, target = (torch.empty(length, dtype=torch.uint8, device=device) for _ in range(2))
    runs = {"TFLOP/s": lambda: a @ b, "GB/s": lambda: target.copy_(source)}
    turns = list(in_turns(runs, device, budget=budget))
    work = {"TFLOP/s": 2 * edge**3 / 1e12, "GB/s": 2 * length / 1e9}
    return {unit: work[unit] / min(turn[unit] for turn in turns) for unit in runs}


def targets(rows: list[dict], ceilings: dict[str, float]) -> dict[str, bool]:
    """Which of the promised numbers were reached."""
    named = {(row["group"], row["name"]): row for row in rows}
    ms = lambda *key: named[key]["milliseconds"]["median"] if key in named else float("inf")  # noqa: E731
    ours = named.get(("attention", "ours, top 3 of 6 + 9"))
    dense = [row for row in rows if row["group"] == "attention" and not row["name"].startswith(("ours", "reference"))]
    fastest = min(dense, key=lambda row: row["milliseconds"]["median"], default=None)
    if ours is None or fastest is None:
        return {"the attention was measured": False}
    chunk = PASSES * MODEL.layers * (ms("attention", ours["name"]) + ms("write", "ours"))
    update = ms("relevance mean", "ours") + ms("replacement", "ours")
    update += PASSES * MODEL.layers * ms("selection", "ours")
    share = lambda group: named.get((group, "ours"), {}).get("share_of_ceiling", 0.0)  # noqa: E731
    return {
        f"attention over 12 frames faster than {fastest['name']}": ms("attention", ours["name"])
        < fastest["milliseconds"]["median"],
        f"attention at 0.9 of the TFLOP/s of {fastest['name']}": ours["rate"] >= 0.9 * fastest["rate"],
        "write at 80 % of the copy bandwidth": share("write") >= 0.8,
        "frame_means at 80 % of the copy bandwidth": share("frame_means") >= 0.8,
        f"relevance, selection, replacement within 1 % of a chunk ({update / chunk:.2%} of attention and write alone)":
        update <= 0.01 * chunk,
    }  # fmt: skip


def table(rows: list[dict]) -> str:
    """The rows as text."""
    lines = [f"{'':18} {'':32} {'ms':>9} {'rate':>10} {'':8} of ceiling"]
    for row in rows:
        rate, median = row["rate"], row["milliseconds"]["median"]
        measured = f"{median:9.4f} {rate:10.1f} {row['unit']:8} {row['share_of_ceiling']:.0%}"
        lines.append(f"{row['group']:18} {row['name']:32} {measured}")
    return "\n".join(lines)

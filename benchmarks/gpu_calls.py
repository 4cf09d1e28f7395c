"""The calls of the speed table: ours and the peers', at the published size, each with the result it has to give.

Keys and values lie as the pool has them, a head's tokens side by side; queries as the linear layers leave them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from memflow_bench.providers.flex import Flex, FlexFlash
from memflow_bench.providers.peers import FLASH_ATTENTION, FlashAttention, FlashInfer, Sdpa, flashinfer_norm_rope
from memflow_kernels import (
    Pool,
    cover_frames,
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
HELD = 24


class Call(NamedTuple):
    """group: calls compared with each other. make: what a program would do once; returns the call that is timed, which
    returns the result to be checked. work: FLOPs or bytes. missing: why it cannot run here."""

    group: str
    name: str
    make: Callable[[], Callable[[], Tensor]]
    expected: Tensor
    work: int
    unit: str  # "TFLOP/s" or "GB/s"
    missing: str | None = None


# What a row is called -> the backend that it shows. The promised numbers are those of "ours", what a user gets.
Ours = dict[str, str]


def ready(run: Callable[..., Tensor], *arguments: object) -> Callable[[], Callable[[], Tensor]]:
    """A `make` for a call that needs nothing done before."""
    return lambda: partial(run, *arguments)


def attention_calls(size: Size, device: torch.device, ours: Ours) -> list[Call]:
    made = partial(states, 1, heads=size.heads, head_dim=size.head_dim, dtype=size.dtype, device=device)
    query = made(CHUNK * size.tokens, seed=0)
    key, value = (made(FRAMES * size.tokens, seed=seed, layout="heads_first") for seed in (1, 2))
    means = frame_means(key[:, : CANDIDATES * size.tokens], size.tokens)
    dense = {"tokens_per_frame": size.tokens, "candidate_frames": CANDIDATES}

    def backend(name: str, top_k: int | None) -> Tensor:
        options = dense if top_k is None else {**dense, "top_k": top_k, "frame_mean": means}
        with use_backend(name):
            return memory_attention(query, key, value, **options)

    top, all_ = (backend("torch", top_k) for top_k in (TOP_K, None))
    per_frame = 4 * query.shape[1] * size.tokens * size.heads * size.head_dim
    few, many = per_frame * (FRAMES - CANDIDATES + TOP_K), per_frame * FRAMES
    call = partial(Call, "attention", unit="TFLOP/s")
    calls = [call("reference path, top 3 of 6 + 9", ready(backend, "torch", TOP_K), top, few)]
    for label, name in ours.items():
        calls.append(call(f"{label}, top 3 of 6 + 9", ready(backend, name, TOP_K), top, few))
        calls.append(call(f"{label}, all 15", ready(backend, name, None), all_, many))
    state = SimpleNamespace(query=query, key=key, value=value, top_k=None)
    peers = [Sdpa("cudnn"), Sdpa("flash"), FlexFlash(), FlashInfer()]
    if device.type == "cuda":  # a CPU would compile it for half a minute
        peers.append(Flex())
    peers += [FlashAttention(version) for version in FLASH_ATTENTION]
    for peer in peers:
        missing = peer.missing(device, size.dtype)
        calls.append(call(f"{peer.name}, all 15", partial(peer.attention, state), all_, many, missing=missing))
    return calls


def write_calls(size: Size, device: torch.device, ours: Ours) -> list[Call]:
    shape = (size.heads, size.head_dim)
    qkv = states(1, CHUNK * size.tokens, 3 * size.heads, size.head_dim, dtype=size.dtype, device=device, seed=3)
    query, key, value = (x.contiguous() for x in qkv.split(size.heads, 2))
    weight = states(1, 1, *shape, dtype=size.dtype, device=device, seed=6, mean=1.0).flatten()
    pool = Pool.zeros(1, FRAMES, size.tokens, *shape, dtype=size.dtype, device=device)
    slots = torch.arange(FRAMES - CHUNK, FRAMES, dtype=torch.int32, device=device)
    start = torch.tensor(1000, device=device)
    options = {"weight_q": weight, "weight_k": weight, "eps": 1e-6, "grid": (size.rows, size.cols)}

    def write(name: str, start: Tensor | int = start) -> Tensor:
        with use_backend(name):
            return qk_norm_rope_write(query, key, value, start_frame=start, pool=pool, slots=slots, **options)

    def written(name: str, start: Tensor | int = start) -> Tensor:
        """The new queries, and what then is in the pool: of that, only the check asks."""
        new = write(name, start)
        return torch.cat([new, pool.key[:, -new.shape[1] :], pool.value[:, -new.shape[1] :]])

    def checked(name: str) -> Callable[[], Tensor]:
        error = relative_error(written(name), expected)
        if not error <= tolerance(size.dtype):
            raise AssertionError(f"what lies in the pool is wrong: relative error {error:.2g}")
        return partial(write, name)

    def peer() -> Callable[[], Tensor]:
        run = flashinfer_norm_rope(qkv.flatten(2), weight, weight, 1e-6, (CHUNK, size.rows, size.cols), size.heads)
        return lambda: torch.stack([x.view(query.shape) for x in run()[:1]])[0]

    def means(name: str) -> Tensor:
        with use_backend(name):
            return frame_means(long_key, size.tokens)

    long_key = states(1, FRAMES * size.tokens, *shape, dtype=size.dtype, device=device, seed=7, layout="heads_first")
    first_frames = write("torch", 0)
    expected = written("torch")
    calls = []
    for label, name in {**ours, "reference path": "torch"}.items():
        calls.append(Call("write", label, partial(checked, name), expected[:1], 6 * query.nbytes, "GB/s"))
        calls.append(Call("frame_means", label, ready(means, name), means("torch"), long_key.nbytes, "GB/s"))
    missing = FlashInfer().missing(device, size.dtype)
    name = "FlashInfer norm + rotation"
    calls.append(Call("write", name, peer, first_frames, 6 * query.nbytes, "GB/s", missing=missing))
    return calls


def update_calls(size: Size, device: torch.device, ours: Ours) -> list[Call]:
    """What a chunk costs beside its passes: relevance and replacement for all layers at once, one selection, and the
    frames that cover the prompt."""
    shape = (size.heads, size.head_dim)
    pool = Pool.zeros(size.layers, FRAMES, size.tokens, *shape, dtype=size.dtype, device=device)
    pool.key.normal_()
    pool.value.normal_()
    pool.frame_mean.copy_(frame_means(pool.key, size.tokens))
    text = states(size.layers, size.text, *shape, dtype=size.dtype, device=device, seed=8)
    query = states(1, CHUNK * size.tokens, *shape, dtype=size.dtype, device=device, seed=9)
    bank = pool.key[:, : CANDIDATES * size.tokens]
    held = states(size.layers, HELD, *shape, dtype=torch.float32, device=device, seed=10)
    # in quarters, whose sums are exact in any order
    scores = (4 * states(1, size.text, HELD, 1, dtype=torch.float32, device=device, seed=11)[..., 0]).round() / 4
    weights = torch.full((1, size.text), 0.25, device=device)
    # the newest frame goes over the one before it: the bank that the other calls read stays as it is
    source = torch.full((size.layers,), FRAMES - 1, dtype=torch.int32, device=device)

    def relevance(name: str, aggregate: str) -> Tensor:
        with use_backend(name):
            if aggregate == "mean":
                return prompt_relevance(text, frame_mean=pool.frame_mean[:, :CANDIDATES])
            if aggregate == "token":
                return prompt_relevance(text, frame_mean=held, aggregate="token")
            return prompt_relevance(text, bank, tokens_per_frame=size.tokens, aggregate="softmax")

    def covering(name: str) -> Tensor:
        with use_backend(name):
            return cover_frames(scores, weights, CANDIDATES, scores.mean(1))

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
        "relevance token": (partial(relevance, aggregate="token"), text.nbytes + held.nbytes),
        "covering": (covering, CANDIDATES * scores.nbytes),
        "selection": (selection, query.nbytes),
        "replacement": (replacement, 4 * bank.nbytes // CANDIDATES),
    }
    return [
        Call(group, label, ready(run, name), run("torch"), work, "GB/s")
        for group, (run, work) in runs.items()
        for label, name in {**ours, "reference path": "torch"}.items()
    ]


def tolerance(dtype: torch.dtype) -> float:
    """Two results that were each rounded a few times."""
    return 1e-5 if dtype == torch.float32 else 6 * torch.finfo(dtype).eps

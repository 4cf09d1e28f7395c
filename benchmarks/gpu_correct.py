"""Whether the kernels are right at the published size, element by element: no norm, in which a wrong tail would drown.

Attention is compared with float64 in two ways. Where queries are like the keys, every number of the result is near the
value of one key: a key that is missing, doubled or masked shows in the queries that look for it, and all the places
where one would go wrong are looked for (the ends of frames and of tiles). Where they are random, the log-sum-exp of
each query is known to 2e-4, which a handful of the 18,720 keys would change. At this size whole tiles of queries and
tiles in pieces are mixed on a GPU of 132 multiprocessors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu_calls import CANDIDATES, CHUNK, FRAMES, HELD, TOP_K, Ours, Size
from memflow_kernels import (
    Pool,
    cover_frames,
    frame_means,
    memory_attention,
    prompt_relevance,
    qk_norm_rope_write,
    replace_frame,
    use_backend,
)
from memflow_kernels.reference import rms_norm, rotate_3d
from memflow_kernels.testing import states

QUERY_BLOCK = 128
LSE_ERROR = 2e-4  # of float32 sums of 128 exact products, and of 18,720 exponentials


class Finding(NamedTuple):
    """what: which check of which backend; worst: the largest error as a share of what is allowed; where: its place."""

    what: str
    worst: float
    where: str

    @property
    def right(self) -> bool:
        return self.worst <= 1


def compared(what: str, actual: Tensor, expected: Tensor, allowed: Tensor | float) -> Finding:
    """actual against expected, allowed: how far each number may be off."""
    off = (actual.double() - expected.double()).abs()
    share = torch.where(off == 0, 0.0, off / torch.as_tensor(allowed, dtype=torch.float64, device=off.device))
    share = share.nan_to_num(nan=torch.inf)
    worst = share.max().item()
    at = [int(i) for i in torch.unravel_index(share.argmax(), share.shape)]
    where = f"{at}: {actual[tuple(at)].item():.6g} instead of {expected[tuple(at)].item():.6g}"
    return Finding(what, worst, f"{where}; {(share > 1).sum().item()} of {share.numel()} numbers are wrong")


def visible_tokens(table: Tensor | None, size: Size) -> Tensor:
    """Numbers of the keys that one head sees; table [k], with -1 for an empty place, or None: all frames."""
    frames = torch.arange(FRAMES)
    if table is not None:
        frames = torch.cat([table[table >= 0].cpu(), frames[CANDIDATES:]])
    return (frames[:, None] * size.tokens + torch.arange(size.tokens)).flatten()


def looked_for(visible: Tensor, queries: int, size: Size, seed: int) -> Tensor:
    """For every query the key that it looks for: first those at the ends of frames and of tiles of 64, then any."""
    place = visible % size.tokens
    edge = (place < 2) | (place >= size.tokens - 2) | (place % 64 <= 1) | (place % 64 == 63)
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([visible[edge], visible[torch.randperm(len(visible), generator=generator)]])
    order = order.repeat(-(-queries // len(order)))[:queries]
    return order[torch.randperm(queries, generator=generator)]


def exact_head(query: Tensor, key: Tensor, value: Tensor, scale: float, rows: int = 1024) -> tuple[Tensor, ...]:
    """query [Lq, D], key and value [Lk, D] -> float64: out [Lq, D], lse [Lq], and |value| [Lq, D] weighed as out."""
    results = []
    for part in query.double().split(rows):
        logits = part @ key.double().T * scale
        share = logits.softmax(-1)
        results.append((share @ value.double(), logits.logsumexp(-1), share @ value.double().abs()))
    return tuple(torch.cat(parts) for parts in zip(*results, strict=True))


def tables(size: Size, device: torch.device) -> dict[str, tuple[Tensor | None, int | None]]:
    """name -> frame_table and query_block. The last head of the first table has an empty place."""
    generator = torch.Generator().manual_seed(11)
    draw = lambda *shape: torch.rand(*shape, CANDIDATES, generator=generator).topk(TOP_K).indices.sort().values  # noqa: E731
    per_head = draw(1, size.heads).int()
    per_head[0, -1, -1] = -1
    blocks = -(-CHUNK * size.tokens // QUERY_BLOCK)
    return {
        f"top {TOP_K} of {CANDIDATES} + {FRAMES - CANDIDATES}": (per_head.to(device), None),
        f"all {FRAMES}": (None, None),
        f"a choice for every {QUERY_BLOCK} queries": (draw(1, size.heads, blocks).int().to(device), QUERY_BLOCK),
    }


def attention(size: Size, device: torch.device, ours: Ours) -> Iterator[Finding]:
    made = lambda frames, seed, **options: states(  # noqa: E731
        1, frames * size.tokens, size.heads, size.head_dim, dtype=size.dtype, device=device, seed=seed, **options
    )
    key, value = made(FRAMES, 1, layout="heads_first"), made(FRAMES, 2, layout="heads_first", mean=1.0)
    random = made(CHUNK, 0)
    scale = size.head_dim**-0.5
    rounding = torch.finfo(size.dtype).eps / 2
    for name, (table, query_block) in tables(size, device).items():
        for kind in ("queries like keys", "random queries"):
            query, expected = random.clone(), []
            for head in range(size.heads):
                of_block = table[0, head].reshape(-1, TOP_K) if table is not None else [None]
                parts = query[0, :, head].split(query_block or query.shape[1])
                for block, (part, chosen) in enumerate(zip(parts, of_block, strict=True)):
                    seen = visible_tokens(chosen, size)
                    if kind == "queries like keys":
                        target = looked_for(seen, len(part), size, seed=100 * head + block)
                        part.copy_(2 * key[0, target.to(device), head])
                    seen = seen.to(device)
                    expected.append(exact_head(part, key[0, seen, head], value[0, seen, head], scale))
            out, lse, mass = (
                torch.cat(parts).unflatten(0, (size.heads, -1)) for parts in zip(*expected, strict=True)
            )  # [H, Lq, D], [H, Lq]
            # every share of a key and the result are rounded once to the format of the values
            allowed = 1.05 * rounding * (mass + out.abs()) + 1e-5 * mass
            options = {"tokens_per_frame": size.tokens, "query_block": query_block, "return_lse": True}
            if table is not None:
                options |= {"frame_table": table, "candidate_frames": CANDIDATES}
            for label, backend in ours.items():
                with use_backend(backend):
                    actual, actual_lse = memory_attention(query, key, value, **options)
                what = f"attention, {name}, {kind}, {label}"
                yield compared(what, actual[0].transpose(0, 1), out, allowed)
                yield compared(f"{what}, log-sum-exp", actual_lse[0], lse, LSE_ERROR)


def write(size: Size, device: torch.device, ours: Ours) -> Iterator[Finding]:
    """Norm, rotation and the write into the pool; then the copy of one frame over another."""
    shape, start = (size.heads, size.head_dim), 100_000
    query, key, value = (
        states(1, CHUNK * size.tokens, *shape, dtype=size.dtype, device=device, seed=seed) for seed in (3, 4, 5)
    )
    weight = states(1, 1, *shape, dtype=size.dtype, device=device, seed=6, mean=1.0).flatten()
    grid = (size.rows, size.cols)
    slots = torch.arange(FRAMES - CHUNK, FRAMES, dtype=torch.int32, device=device)
    for label, backend in ours.items():
        pool = Pool.zeros(1, FRAMES, size.tokens, *shape, dtype=size.dtype, device=device)
        pool.key.fill_(7.0)
        options = {"weight_q": weight, "weight_k": weight, "eps": 1e-6, "grid": grid, "start_frame": start}
        with use_backend(backend):
            new_query, query_mean = qk_norm_rope_write(
                query, key, value, pool=pool, slots=slots, query_mean=True, **options
            )
        first = (FRAMES - CHUNK) * size.tokens
        for name, actual, x in (("query", new_query, query), ("key", pool.key[:, first:], key)):
            exact = rotate_3d(rms_norm(x.flatten(2), weight, 1e-6).view(x.shape), grid, start).double()
            pair = exact.unflatten(-1, (-1, 2)).norm(dim=-1, keepdim=True).expand(-1, -1, -1, -1, 2).flatten(-2)
            units = 3 if size.dtype == torch.float32 else 1
            yield compared(
                f"norm and rotation, {name}, {label}", actual, exact, units * torch.finfo(size.dtype).eps * pair
            )
        yield compared(f"stored values, {label}", pool.value[:, first:], value, 0.0)
        yield compared(f"slots that were not written, {label}", pool.key[:, :first], pool.key[:, :first] * 0 + 7, 0.0)
        held = pool.key.double().unflatten(1, (FRAMES, -1)).mean(2)
        yield compared(f"stored means, {label}", pool.frame_mean[:, -CHUNK:], held[:, -CHUNK:], 1e-5)
        yield compared(f"mean of the queries, {label}", query_mean, new_query.double().mean(1), 1e-5)
        with use_backend(backend):
            yield compared(f"frame_means, {label}", frame_means(pool.key, size.tokens), held, 1e-5)
            replace_frame(pool, slots[:1] * 0 + 1, slots[-1:])
        for part in pool[:2]:
            frames = part.unflatten(1, (FRAMES, -1))
            yield compared(f"replaced frame, {label}", frames[:, 1], frames[:, -1], 0.0)
            yield compared(f"the frame beside it, {label}", frames[:, 2], frames[:, 3], 0.0)


def covering(size: Size, device: torch.device, ours: Ours) -> Iterator[Finding]:
    """The scores of every text token, with a prompt of another length than the tiles, and the frames that cover it."""
    shape, tokens = (size.heads, size.head_dim), size.text - 1
    text = states(2, tokens, *shape, dtype=size.dtype, device=device, seed=7)
    means = states(2, HELD + 1, *shape, dtype=torch.float32, device=device, seed=8, layout="heads_first")
    wide, mean_wide = (x.double().flatten(2) / (size.heads * size.head_dim**0.5) ** 0.5 for x in (text, means))
    expected, mass = wide @ mean_wide.mT, wide.abs() @ mean_wide.abs().mT
    # in quarters, whose sums are exact: equal frames are common
    scores = (4 * states(3, tokens, HELD + 1, 1, device=device, seed=9)[..., 0]).round() / 4
    row = torch.full((3, tokens), 0.25, device=device), 6, torch.zeros(3, HELD + 1, device=device)
    with use_backend("torch"):
        covered = cover_frames(scores, *row)
    for label, backend in ours.items():
        with use_backend(backend):
            actual = prompt_relevance(text, frame_mean=means, aggregate="token")
            yield compared(f"relevance per token, {label}", actual, expected, 1e-5 * mass)
            yield compared(f"frames that cover, {label}", cover_frames(scores, *row), covered, 0.0)


def check(size: Size, device: torch.device, ours: Ours, report: Callable[[Finding], None]) -> bool:
    """Whether everything is right; report is given every finding as it comes."""
    right = True
    for find in (attention, write, covering):
        for finding in find(size, device, ours):
            report(finding)
            right &= finding.right
    return right

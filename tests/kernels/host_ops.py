"""The ops by the host build of csrc/: tensors in, tensors out, like the functions of memflow_kernels.reference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from host_build import Process
from torch import Tensor

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
UNSUPPORTED = 801


class States:
    """A tensor passed as MemflowStates: its address and first three strides."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


def run_of(x: Tensor) -> Tensor:
    """The memory from the first to the last element of x, as one dimension."""
    if x.numel() == 0:
        return x.new_empty(0)
    length = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.as_strided((length,), (1,), x.storage_offset())


class HostOps:
    """The ops in the process of a host build. Outputs are NaN, or far outside, until a kernel writes them."""

    def __init__(self, process: Process) -> None:
        self.process = process

    @contextmanager
    def machine(self, multiprocessors: int = 3, last_block_first: bool = False) -> Iterator[None]:
        """Inside the block kernels see that many multiprocessors, and the blocks of a grid run in that order."""

        def choose(*settings: int) -> None:
            self.process.call(("cuda_host_set", [("int", value) for value in settings], "int", []))

        choose(multiprocessors, int(last_block_first))
        try:
            yield
        finally:
            choose(3, 0)

    def launched(self) -> int:
        """Threads launched since the last question."""
        return self.process.call(("cuda_host_launched", [], "int64", []))[0]

    def call(self, name: str, *arguments: object, result: str = "int") -> int:
        """A function of launch.h: int, float, None, Tensor or States in; every tensor's memory is brought back."""
        buffers, memories, request = [], [], []
        for value in arguments:
            if isinstance(value, Tensor | States):
                x = value.x if isinstance(value, States) else value
                memory = run_of(x)
                lead = x.storage_offset() * x.element_size() % 16  # keeps the alignment
                place = (len(buffers), lead)
                buffers.append(bytes(lead) + bytes(memory.view(torch.uint8).numpy()) if x.numel() else b"\0")
                memories.append(memory)
                request.append(("states", *place, x.stride()[:3]) if isinstance(value, States) else ("memory", *place))
            elif value is None:
                request.append(("null", None))
            else:
                request.append(("double" if isinstance(value, float) else "int64", value))
        code, contents = self.process.call((f"memflow_{name}", request, result, buffers))
        for memory, content, (_, _, lead, *_) in zip(
            memories, contents, [entry for entry in request if entry[0] in ("states", "memory")], strict=True
        ):
            if memory.numel():
                memory.view(torch.uint8).copy_(torch.frombuffer(bytearray(content[lead:]), dtype=torch.uint8))
        return code

    def run(self, name: str, *arguments: object) -> None:
        code = self.call(name, *arguments)
        if code == UNSUPPORTED:
            raise NotImplementedError(f"{name}: unsupported")
        if code:
            raise RuntimeError(f"{name}: error {code}")

    def workspace(self, name: str, *sizes: int) -> Tensor:
        size = self.call(f"{name}_workspace", *sizes, result="int64")
        return torch.full((size,), 0xFF, dtype=torch.uint8)

    def frame_means(self, key: Tensor, tokens_per_frame: int) -> Tensor:
        batch, tokens, heads, head_dim = key.shape
        frames = tokens // tokens_per_frame
        mean = poison(batch, frames, heads, head_dim)
        sizes = (batch, frames, tokens_per_frame, heads, head_dim)
        self.run("frame_means", States(key), DTYPES[key.dtype], *sizes, mean, None)
        return mean

    def prompt_relevance_mean(
        self, text_key: Tensor, frame_mean: Tensor, text_mask: Tensor | None, scale: float
    ) -> Tensor:
        batch, tokens, heads, head_dim = text_key.shape
        score = poison(batch, frame_mean.shape[1])
        workspace = self.workspace("prompt_relevance_mean", batch, tokens, heads, head_dim)
        sizes = (batch, tokens, frame_mean.shape[1], heads, head_dim)
        states = (States(text_key), DTYPES[text_key.dtype], text_mask, States(frame_mean))
        self.run("prompt_relevance_mean", *states, *sizes, float(scale), score, workspace, None)
        return score

    def prompt_relevance_token(
        self, text_key: Tensor, frame_mean: Tensor, text_mask: Tensor | None, scale: float
    ) -> Tensor:
        batch, tokens, heads, head_dim = text_key.shape
        frames = frame_mean.shape[1]
        score = poison(batch, tokens, frames)
        states = (States(text_key), DTYPES[text_key.dtype], text_mask, States(frame_mean))
        sizes = (batch, tokens, frames, heads, head_dim)
        self.run("prompt_relevance_token", *states, *sizes, float(scale), score, None)
        return score

    def cover_frames(self, scores: Tensor, weights: Tensor, k: int, prior: Tensor) -> Tensor:
        rows, tokens, frames = scores.shape
        table = torch.full((rows, min(k, frames)), -77, dtype=torch.int32)
        parts = (scores.contiguous(), DTYPES[scores.dtype], weights.contiguous(), prior.contiguous())
        self.run("cover_frames", *parts, rows, tokens, frames, k, table, None)
        return table

    def prompt_relevance_softmax(
        self, text_key: Tensor, key: Tensor, text_mask: Tensor | None, tokens_per_frame: int, scale: float
    ) -> Tensor:
        batch, tokens, heads, head_dim = text_key.shape
        frames = key.shape[1] // tokens_per_frame
        score = poison(batch, frames)
        workspace = self.workspace("prompt_relevance_softmax", batch, tokens, heads, frames)
        sizes = (batch, tokens, frames, tokens_per_frame, heads, head_dim)
        states = (States(text_key), States(key), DTYPES[key.dtype], text_mask)
        self.run("prompt_relevance_softmax", *states, *sizes, float(scale), score, workspace, None)
        return score

    def select_frames(
        self,
        query: Tensor,
        frame_mean: Tensor,
        top_k: int,
        valid: Tensor | None = None,
        query_block: int | None = None,
        query_mean: Tensor | None = None,
    ) -> Tensor:
        batch, queries, heads, head_dim = query.shape
        frames = frame_mean.shape[1]
        blocks = 1 if query_block is None else -(-queries // query_block)
        table = torch.full((batch, heads, blocks, min(top_k, frames)), -77, dtype=torch.int32)
        block = query_block or 0
        workspace = None
        if query_mean is None:
            workspace = self.workspace("select_frames", batch, queries, heads, head_dim, block)
        sizes = (batch, queries, frames, heads, head_dim, top_k, block)
        states = (States(query), DTYPES[query.dtype], query_mean, States(frame_mean), valid)
        self.run("select_frames", *states, *sizes, table, workspace, None)
        return table.squeeze(2) if query_block is None else table

    def memory_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        frame_table: Tensor | None,
        tokens_per_frame: int,
        candidate_frames: int,
        scale: float,
        query_block: int | None = None,
        with_lse: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        batch, queries, heads, head_dim = query.shape
        out = poison(*query.shape, dtype=query.dtype)
        lse = poison(batch, heads, queries) if with_lse else None
        places = 0 if frame_table is None else frame_table.shape[-1]
        candidates = 0 if frame_table is None else candidate_frames
        sizes = (batch, queries, key.shape[1] // tokens_per_frame, tokens_per_frame, heads, head_dim)
        sizes = (*sizes, places, candidates, query_block or 0)
        workspace = self.workspace("memory_attention", DTYPES[query.dtype], *sizes)
        states = (States(query), States(key), States(value), DTYPES[query.dtype], frame_table)
        self.run("memory_attention", *states, *sizes, float(scale), out, lse, workspace, None)
        return out, lse

    def qk_norm_rope_write(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        weight_q: Tensor | None,
        weight_k: Tensor | None,
        eps: float,
        rows: int,
        cols: int,
        start_frame: int,
        start: Tensor | None,
        pool_key: Tensor,
        pool_value: Tensor,
        pool_frame_mean: Tensor,
        slots: Tensor,
        with_query_mean: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        batch, tokens, heads, head_dim = query.shape
        frames = tokens // (rows * cols)
        new_query = poison(*query.shape, dtype=query.dtype)
        query_mean = poison(batch, heads, head_dim) if with_query_mean else None
        workspace = self.workspace(
            "qk_norm_rope_write", batch, frames, rows * cols, heads, head_dim, int(with_query_mean)
        )
        kinds = [DTYPES[query.dtype if weight is None else weight.dtype] for weight in (weight_q, weight_k)]
        weights = (weight_q, kinds[0], weight_k, kinds[1])
        pool = (States(pool_key), States(pool_value), States(pool_frame_mean), pool_frame_mean.shape[1])
        self.run(
            "qk_norm_rope_write",
            *(States(query), States(key), States(value), DTYPES[query.dtype], *weights),
            *(batch, frames, rows, cols, heads, head_dim, float(eps)),
            *(start_frame, start, 0 if start is None else start.element_size()),
            *(*pool, slots, new_query, query_mean, workspace, None),
        )
        return new_query, query_mean

    def replace_frame(
        self, pool_key: Tensor, pool_value: Tensor, pool_frame_mean: Tensor, slot: Tensor, source_slot: Tensor
    ) -> None:
        batch, tokens, heads, head_dim = pool_key.shape
        slots = pool_frame_mean.shape[1]
        pool = (States(pool_key), States(pool_value), States(pool_frame_mean), DTYPES[pool_key.dtype])
        self.run("replace_frame", *pool, batch, slots, tokens // slots, heads, head_dim, slot, source_slot, None)

    def gather_frames(
        self, key: Tensor, value: Tensor, frame_table: Tensor, tokens_per_frame: int, candidate_frames: int
    ) -> tuple[Tensor, Tensor]:
        batch, tokens, heads, head_dim = key.shape
        places = frame_table.shape[-1]
        packed_tokens = tokens + (places - candidate_frames) * tokens_per_frame
        packed = [poison(batch, heads, packed_tokens, head_dim, dtype=key.dtype) for _ in range(2)]
        sizes = (batch, tokens // tokens_per_frame, tokens_per_frame, heads, head_dim, places, candidate_frames)
        self.run("gather_frames", States(key), States(value), DTYPES[key.dtype], frame_table, *sizes, *packed, None)
        return packed[0].transpose(1, 2), packed[1].transpose(1, 2)


def poison(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype)

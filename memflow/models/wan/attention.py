"""Attention processors that give diffusers' WanTransformer3DModel a memory, the model itself unchanged.

`install(transformer)` replaces the attention processors and the `rope` module. The processors own nothing: pools,
prompt and position belong to a call, a `Pass` that they are bound to; so streams can share a model.

A call's numbers (where it stands, which slots it sees) come through `rope`: the transformer hands what that module
returns to every self-attention as it is, in place of the angles that `qk_norm_rope_write` computes from where the call
stands. Numbers that the processors held themselves would be constants to torch.compile: a new graph for every chunk.
"""

from __future__ import annotations

from contextlib import contextmanager
from operator import is_
from typing import TYPE_CHECKING

import torch
from diffusers import ContextParallelConfig, WanTransformer3DModel
from diffusers.hooks.context_parallel import apply_context_parallel
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from memflow.errors import MemFlowError
from memflow.memory.attention import attend
from memflow.memory.places import Unplaced
from memflow.models.wan.changes import FETCHED, refuse_hooks
from memflow.parallel import ALONE, Alone
from memflow.parallel.ranks import Ranks, require_division
from memflow_kernels import Pool, memory_attention, qk_norm_rope, qk_norm_rope_write

if TYPE_CHECKING:
    from memflow.memory.attention import Pass

# The clean pass ends before proj_out by an exception; hooks of a call that is left so hold nothing.
_PLAN = {
    "blocks.0": {"hidden_states": ContextParallelInput(split_dim=1, expected_dims=3)},
    "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
}


class CleanPassDone(Exception):
    """The last layer's keys and values are written: a clean pass has done all that it is for."""


class MemorySelfAttention:
    """Self-attention of one layer: writes the new K and V into the pool and attends to memory and window in place."""

    def __init__(self, layer: int):
        self.layer = layer
        self.pool: Pool | None = None
        self.unplaced: Unplaced | None = None
        self.block_mean: Tensor | None = None
        self.ends = False  # this is the last layer of a clean pass
        self.called = False  # in the call in progress

    def bind(self, step: Pass, clean: bool) -> None:
        """The next calls belong to `step`.

        A layer's tensors are picked here and not in the call, so that compiled blocks share one graph.
        """
        self.pool = step.pools[self.layer]
        self.unplaced = step.unplaced[self.layer] if step.unplaced else None
        self.block_mean = step.block_means[self.layer] if step.block_means else None
        self.ends, self.called = clean and self.layer == len(step.pools) - 1, False

    def release(self) -> None:
        """Hold nothing of a stream's any more: these are views, and any of them keeps the whole pool in memory."""
        self.pool = self.unplaced = self.block_mean = None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb: Pass = None):
        query, query_mean = self.write(attn, hidden_states, rotary_emb)
        self.called = True
        if not torch.compiler.is_compiling() and self.ends:
            raise CleanPassDone
        hidden_states = self.attend(query, query_mean, rotary_emb)
        return attn.to_out[1](attn.to_out[0](hidden_states.flatten(2)))

    def attend(self, query: Tensor, query_mean: Tensor | None, step: Pass) -> Tensor:
        """[B, L, H, D]: what the queries find in the pool."""
        return attend(query, query_mean, self.pool, step, self.block_mean)

    def write(self, attn, hidden_states: Tensor, step: Pass) -> tuple[Tensor, Tensor | None]:
        """Project, norm and rotate; keys and values go into the pool.

        Returns the queries [B, L, H, D] and, where heads choose frames by it, their mean [B, H, D].
        """
        if getattr(attn, "fused_projections", False):
            projected = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            projected = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query, key, value, norm = self.divide(attn, *(x.unflatten(2, (attn.heads, -1)) for x in projected))
        if self.unplaced is not None:
            self.unplaced.write(self.at_place_zero(key, step, norm), step.slots)
        one_choice = step.chooses and step.query_block is None
        written = qk_norm_rope_write(
            query,
            key,
            value,
            **norm,
            grid=step.grid,
            start_frame=step.start_frame,
            pool=self.pool,
            slots=step.slots,
            query_mean=one_choice,
        )
        return written if one_choice else (written, None)

    def divide(self, attn, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, dict]:
        """The tokens and heads that are written and attended to here, and how they are still to be normed."""
        norm = {"weight_q": attn.norm_q.weight, "weight_k": attn.norm_k.weight, "eps": attn.norm_q.eps}
        return query, key, value, norm

    def at_place_zero(self, key: Tensor, step: Pass, norm: dict) -> Tensor:
        """key [B, n*N, H, D], normed and turned by row and column only: [B, n, N, H, D]."""
        frames = key.unflatten(1, (-1, step.grid[0] * step.grid[1])).flatten(0, 1)  # every frame a first frame
        _, turned = qk_norm_rope(frames, frames, **norm, grid=step.grid, start_frame=0)
        return turned.unflatten(0, (key.shape[0], -1))


class SharedSelfAttention(MemorySelfAttention):
    """The same for one of several processes: some tokens come in with all heads, all tokens are written and attended to
    with some heads, and what they find goes out as it came in."""

    def __init__(self, layer: int, ranks: Alone):
        super().__init__(layer)
        self.ranks = ranks

    def attend(self, query: Tensor, query_mean: Tensor | None, step: Pass) -> Tensor:
        return self.ranks.to_tokens(super().attend(query, query_mean, step))

    def divide(self, attn, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, dict]:
        # The norm is over all heads of a token, so that it comes before the exchange.
        return *self.ranks.to_heads(_normed(query, attn.norm_q), _normed(key, attn.norm_k), value), {}

    def at_place_zero(self, key: Tensor, step: Pass, norm: dict) -> Tensor:
        tokens = step.grid[0] * step.grid[1]
        frames = key.unflatten(1, (-1, tokens)).flatten(0, 1)
        turned = Pool.zeros(len(frames), 1, tokens, *frames.shape[2:], dtype=key.dtype, device=key.device)
        slots = torch.zeros(1, dtype=torch.int32, device=key.device)
        qk_norm_rope_write(frames, frames, frames, grid=step.grid, start_frame=0, pool=turned, slots=slots)
        return turned.key.unflatten(0, (key.shape[0], -1))


def _normed(x: Tensor, norm: nn.Module) -> Tensor:
    """x [B, L, H, D], rounded where `qk_norm_rope` rounds."""
    wide = torch.promote_types(x.dtype, torch.float32)
    square = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True, dtype=wide).square() / x[0, 0].numel()
    return (x * torch.rsqrt(square + norm.eps)).to(x.dtype) * norm.weight.view(x.shape[2:])


class PromptCrossAttention:
    """Cross-attention of one layer to the prompt's keys and values, which were computed once."""

    def __init__(self, layer: int):
        self.layer = layer
        self.key: Tensor | None = None
        self.value: Tensor | None = None

    def bind(self, step: Pass, clean: bool) -> None:
        """The next calls belong to `step`."""
        self.key, self.value = step.prompt.key[self.layer], step.prompt.value[self.layer]

    def release(self) -> None:
        """Hold nothing of a stream's any more."""
        self.key = self.value = None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        hidden_states = memory_attention(query, self.key, self.value, tokens_per_frame=self.key.shape[1])
        return attn.to_out[1](attn.to_out[0](hidden_states.flatten(2)))


class StreamContext(nn.Module):
    """Takes the place of the transformer's `rope`: hands every self-attention the `Pass` of the call in progress."""

    def __init__(self):
        super().__init__()
        self.ranks: Alone = ALONE
        self.step: Pass | None = None
        self.processors: list[MemorySelfAttention | PromptCrossAttention] = []

    def forward(self, hidden_states: Tensor) -> Pass:
        if self.step is None:
            raise MemFlowError(
                "this transformer has MemFlow's attention installed and runs inside a stream only: "
                "use MemFlowPipeline.stream, or memflow.models.wan.attention.uninstall(transformer) first"
            )
        return self.step

    def set_processors(self, transformer: WanTransformer3DModel) -> None:
        """Let the transformer attend with these processors."""
        for block, of_frames, of_text in zip(
            transformer.blocks, self.processors[::2], self.processors[1::2], strict=True
        ):
            block.attn1.set_processor(of_frames)
            block.attn2.set_processor(of_text)

    def require_installed(self, transformer: WanTransformer3DModel) -> None:
        """MemFlowError where the transformer has no longer the attention that `install` gave it."""
        found = [attn.processor for block in transformer.blocks for attn in (block.attn1, block.attn2)]
        if len(found) != len(self.processors) or not all(map(is_, found, self.processors)):
            raise MemFlowError(
                "transformer: its attention processors have been replaced since the stream began, which goes on with "
                "MemFlow's own only: make the stream again, or resume it from a saved state"
            )

    @contextmanager
    def during(self, step: Pass, *, clean: bool = False):
        """The calls of the transformer in this block belong to `step`; clean: nobody reads what they return."""
        if self.step is not None:
            raise MemFlowError("this transformer is in a call already: streams that share it can only take turns")
        try:
            for processor in self.processors:
                processor.bind(step, clean)
            self.step = step._replace(pools=(), prompt=None, unplaced=(), block_means=())
            yield
        finally:
            self.step = None
            for processor in self.processors:
                processor.release()


def install(transformer: WanTransformer3DModel) -> StreamContext:
    """Give the transformer a memory; returns the context that its calls run in. Installing twice changes nothing."""
    refuse_hooks(transformer)
    if isinstance(transformer.rope, StreamContext):
        transformer.rope.set_processors(transformer)  # others may have been set since
        return transformer.rope
    if any(block.attn2.add_k_proj is not None for block in transformer.blocks):
        raise MemFlowError("transformer: image-to-video checkpoints (added_kv_proj_dim) have no streaming memory")
    if transformer.config.patch_size[0] != 1:
        raise MemFlowError(f"transformer: patch_size must be (1, h, w), got {tuple(transformer.config.patch_size)}")
    if any(parameter.is_meta for parameter in transformer.parameters()):
        raise MemFlowError(FETCHED)
    context = StreamContext()
    context.replaced_rope = [transformer.rope]
    context.ranks = vars(transformer).get("ranks", ALONE)  # `share`
    for layer in range(len(transformer.blocks)):
        alone = context.ranks is ALONE
        of_frames = MemorySelfAttention(layer) if alone else SharedSelfAttention(layer, context.ranks)
        context.processors += [of_frames, PromptCrossAttention(layer)]
    context.set_processors(transformer)
    transformer.rope = context
    return context


def uninstall(transformer: WanTransformer3DModel) -> None:
    """Give the transformer its own attention back."""
    if not isinstance(transformer.rope, StreamContext):
        return
    for block in transformer.blocks:
        for attn in (block.attn1, block.attn2):
            attn.set_processor(attn._default_processor_cls())
    transformer.rope = transformer.rope.replaced_rope[0].to(transformer.device)


def share(transformer: WanTransformer3DModel, ranks: Ranks) -> None:
    """Let all processes of `ranks` compute every call of `transformer` together, for good: diffusers' hooks for context
    parallelism split its tokens.

    diffusers' own `enable_parallelism` does not serve here: it splits keys inside its attention functions, which a
    memory's processors do without, and splits what `rope` returns, which here is a call's `Pass`.

    Args:
        transformer: the same in all of them.
        ranks: at least two.

    Raises:
        MemFlowError: their number does not divide the heads.
    """
    require_division(ranks.size, transformer.config.num_attention_heads)
    config = ContextParallelConfig(ulysses_degree=ranks.size)
    mesh = init_device_mesh(transformer.device.type, config.mesh_shape, mesh_dim_names=config.mesh_dim_names)
    config.setup(ranks.rank, ranks.size, transformer.device, mesh)
    apply_context_parallel(transformer, config, _PLAN)
    uninstall(transformer)
    transformer.ranks = ranks
    install(transformer)

"""The three ways a stream calls its transformer: encode a prompt, denoise a chunk, fix a chunk's keys and values."""

from __future__ import annotations

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from memflow.memory.frames import Pass, Prompt
from memflow.models.wan.attention import StreamContext, install


def encode_prompt(transformer: WanTransformer3DModel, embeds: Tensor, mask: Tensor) -> Prompt:
    """Cross-attention keys and values of every layer.

    embeds: [B, T, text_dim] from the text encoder, rows of padding zero. mask: [B, T], True = not padding.
    """
    _bring_to_device(transformer)
    keys, values = [], []
    with _own_dtypes(embeds):
        text = transformer.condition_embedder.text_embedder(embeds)
        for block in transformer.blocks:
            attn = block.attn2
            if getattr(attn, "fused_projections", False):
                key, value = attn.to_kv(text).chunk(2, dim=-1)
            else:
                key, value = attn.to_k(text), attn.to_v(text)
            keys.append(attn.norm_k(key).unflatten(2, (attn.heads, -1)))
            values.append(value.unflatten(2, (attn.heads, -1)))
    return Prompt(torch.stack(keys), torch.stack(values), mask)


def denoise(transformer: WanTransformer3DModel, latents: Tensor, timestep: float | Tensor, step: Pass) -> Tensor:
    """Flow [B, C, F, h, w] that the model sees in `latents` (same shape) at `timestep`, 0 to 1000 or a tensor [B].

    Overwrites the keys and values that an earlier pass over the same frames left in the pool.
    """
    step = step._replace(unplaced=())  # what later chunks see is written by the clean pass
    context = _context(transformer)
    _bring_to_device(transformer)  # not in inference mode, which would leave weights that cannot be trained any more
    with context.during(step), _own_dtypes(latents), torch.inference_mode():
        times, no_text = _timesteps(latents, timestep), _no_text(transformer, latents)
        flow = transformer(latents, times, no_text, return_dict=False)[0]
    return flow.clone()  # the caller's own, with which autograd may do what it likes


def fix(transformer: WanTransformer3DModel, latents: Tensor, step: Pass) -> None:
    """Write the keys and values of clean `latents` [B, C, F, h, w] into the pool: a forward at timestep 0.

    Nobody reads the output of such a pass, so it ends with the last layer's keys and values: that layer's attention,
    cross-attention and feed-forward and the head are left out.
    """
    context = _context(transformer)
    _bring_to_device(transformer)
    with context.during(step), _own_dtypes(latents), torch.inference_mode():
        hidden = transformer.patch_embedding(latents).flatten(2).transpose(1, 2).contiguous()
        times, no_text = _timesteps(latents, 0.0), _no_text(transformer, latents)
        _, modulation, text, _ = transformer.condition_embedder(times, no_text)
        modulation = modulation.unflatten(1, (6, -1))
        for block in transformer.blocks[:-1]:
            hidden = block(hidden, text, modulation, context.step)
        last = transformer.blocks[-1]
        shift, scale = (last.scale_shift_table + modulation.float()).chunk(6, dim=1)[:2]
        hidden = (last.norm1(hidden.float()) * (1 + scale) + shift).type_as(hidden)
        last.attn1.processor.write(last.attn1, hidden, context.step)


def _context(transformer: WanTransformer3DModel) -> StreamContext:
    # install() looks through all modules for what it must refuse: once for a stream, not in every pass.
    context = transformer.rope
    return context if isinstance(context, StreamContext) else install(transformer)


def _timesteps(latents: Tensor, timestep: float | Tensor) -> Tensor:
    if isinstance(timestep, Tensor):
        return timestep
    return torch.full((latents.shape[0],), timestep, dtype=torch.float32, device=latents.device)


def _no_text(transformer: WanTransformer3DModel, latents: Tensor) -> Tensor:
    # The prompt's keys and values come with the Pass; no text here saves its projection in every call.
    return latents.new_empty((latents.shape[0], 0, transformer.config.text_dim))


def _own_dtypes(like: Tensor) -> torch.autocast:
    # The pool has the dtype of the weights; under a caller's autocast the new keys would have another.
    return torch.autocast(like.device.type, enabled=False)


def _bring_to_device(transformer: WanTransformer3DModel) -> None:
    # Under model offloading only transformer.forward would fetch the weights.
    hook = getattr(transformer, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(transformer)

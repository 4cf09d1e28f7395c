"""`WanModel`: diffusers' WanTransformer3DModel as a stream calls it."""

from __future__ import annotations

import json
from collections.abc import Hashable
from contextlib import suppress

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from memflow.errors import MemFlowError
from memflow.memory.attention import Pass
from memflow.memory.places import Rotation
from memflow.memory.views import Prompt
from memflow.models.digests import weights_digest
from memflow.models.wan.attention import CleanPassDone, StreamContext, install, uninstall
from memflow.models.wan.changes import adapters, layout, refuse_hooks, text_version
from memflow.models.wan.graphs import GraphedPasses


class WanModel:
    """A `memflow.models.base.VideoModel` around a transformer, which is used in place.

    Its attention processors and its `rope` module are replaced; weights, adapters and blocks stay what they are.
    Several of these on one transformer can take turns.

    Args:
        transformer: a text-to-video WanTransformer3DModel.
        cuda_graphs: replay passes, denoising and clean, as CUDA graphs; needs a GPU, and weights that stay where they
            are.

    Raises:
        MemFlowError: the transformer cannot have a memory (image to video, layers that are moved one by one).
    """

    rotation = Rotation()

    def __init__(self, transformer: WanTransformer3DModel, *, cuda_graphs: bool = False):
        if not isinstance(transformer, WanTransformer3DModel):
            raise MemFlowError(f"transformer must be a WanTransformer3DModel, got {type(transformer).__name__}")
        self.context = install(transformer)
        self.ranks = self.context.ranks
        self.transformer = transformer
        config = transformer.config
        self.layers, self.heads, self.head_dim = (
            config.num_layers,
            config.num_attention_heads,
            config.attention_head_dim,
        )
        self.channels, self.text_dim = config.in_channels, config.text_dim
        self._graphs = GraphedPasses(transformer, self._denoise, self._write_clean) if cuda_graphs else None

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.dtype

    @property
    def device(self) -> torch.device:
        # Under `enable_model_cpu_offload` the weights lie elsewhere between calls.
        device = getattr(vars(self.transformer).get("_hf_hook"), "execution_device", None)
        # diffusers' own property walks over all modules; streams ask before every chunk.
        return self.transformer.scale_shift_table.device if device is None else torch.device(device)

    def grid(self, rows: int, columns: int) -> tuple[int, int]:
        _, high, wide = self.transformer.config.patch_size
        if rows % high or columns % wide:
            raise ValueError(f"h and w must be multiples of {high} and {wide}, got {rows} and {columns}")
        return rows // high, columns // wide

    @torch.no_grad()
    def encode_prompt(self, embeds: Tensor, mask: Tensor) -> Prompt:
        self._bring_to_device()
        keys, values = [], []
        with _own_dtypes(embeds):
            text = self.transformer.condition_embedder.text_embedder(embeds)
            for block in self.transformer.blocks:
                attn = block.attn2
                if getattr(attn, "fused_projections", False):
                    key, value = attn.to_kv(text).chunk(2, dim=-1)
                else:
                    key, value = attn.to_k(text), attn.to_v(text)
                keys.append(attn.norm_k(key).unflatten(2, (attn.heads, -1)))
                values.append(value.unflatten(2, (attn.heads, -1)))
        return Prompt(torch.stack(keys), torch.stack(values), mask)

    def text_version(self) -> Hashable:
        transformer = self.transformer
        refuse_hooks(transformer)
        # Uninstalled meanwhile, by a stream that has ended for example: this one goes on.
        self.context = transformer.rope if isinstance(transformer.rope, StreamContext) else install(transformer)
        self.context.require_installed(transformer)
        if self._graphs is not None:
            self._graphs.follow(layout(transformer))
        return text_version(transformer)

    def denoise(self, latents: Tensor, timestep: float, step: Pass) -> Tensor:
        denoise = self._denoise if self._graphs is None else self._graphs.denoise
        return denoise(latents, timestep, step._replace(unplaced=()))  # what later chunks see is of the clean pass

    def write_clean(self, latents: Tensor, step: Pass) -> None:
        """As in the protocol: a forward at timestep 0, which ends where the last layer's keys are written, since nobody
        reads its output. Compiled blocks cannot end so; they compute the last layer to its end."""
        write_clean = self._write_clean if self._graphs is None else self._graphs.write_clean
        write_clean(latents, step)

    def identity(self) -> str:
        # The config's own entries: those that begin with _ say where the folder lay.
        config = {key: value for key, value in self.transformer.config.items() if not key.startswith("_")}
        found = f"{json.dumps(config, sort_keys=True, default=str)} {weights_digest(self.transformer)}"
        used = adapters(self.transformer)  # how much of them counts is no weight
        return f"{found} {json.dumps(used, sort_keys=True)}" if used else found

    def remove(self) -> None:
        """Give the transformer its own attention back."""
        uninstall(self.transformer)

    def _denoise(self, latents: Tensor, timestep: float | Tensor, step: Pass) -> Tensor:
        flow = self._forward(latents, timestep, step).clone()  # the caller's own, outside inference mode
        self._require_called()
        return flow

    def _write_clean(self, latents: Tensor, step: Pass) -> None:
        with suppress(CleanPassDone):
            self._forward(latents, 0.0, step, clean=True)
        self._require_called()

    def _forward(self, latents: Tensor, timestep: float | Tensor, step: Pass, *, clean: bool = False) -> Tensor:
        self._bring_to_device()  # not in inference mode, which would leave weights that cannot be trained any more
        with self.context.during(step, clean=clean), _own_dtypes(latents), torch.inference_mode():
            if not isinstance(timestep, Tensor):
                timestep = torch.full((latents.shape[0],), timestep, dtype=torch.float32, device=latents.device)
            # The prompt's keys and values come with the step; no text here saves its projection in every call.
            no_text = latents.new_empty((latents.shape[0], 0, self.text_dim))
            return self.transformer(latents, timestep, no_text, return_dict=False)[0]

    def _require_called(self) -> None:
        """MemFlowError where some layers were not called: they wrote no keys."""
        skipped = [processor.layer for processor in self.context.processors[::2] if not processor.called]
        if 0 < len(skipped) < self.layers:
            raise MemFlowError(
                f"transformer: the attention of layer {skipped[0]} was not called, so that its keys are missing in the "
                "memory; remove what skips it, a cache or a hook for example"
            )

    def _bring_to_device(self) -> None:
        # Under model offloading only transformer.forward would fetch the weights.
        hook = getattr(self.transformer, "_hf_hook", None)
        if hook is not None:
            hook.pre_forward(self.transformer)


def _own_dtypes(like: Tensor) -> torch.autocast:
    # The pool has the dtype of the weights; under a caller's autocast the new keys would have another.
    return torch.autocast(like.device.type, enabled=False)

"""`MemFlowPipeline`: a diffusers pipeline that tells stories chunk by chunk."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders import WanLoraLoaderMixin
from diffusers.utils import BaseOutput
from torch import Tensor

from memflow.decoders import StreamDecoder, current_class, stream_decoder
from memflow.errors import MemFlowError, MemFlowWarning
from memflow.memory.config import MemoryConfig
from memflow.models.wan.adapter import WanModel
from memflow.models.wan.attention import share
from memflow.models.wan.float8 import to_float8
from memflow.models.wan.graphs import require_gpu
from memflow.models.wan.published import PRESETS, find_preset
from memflow.models.wan.text import PromptCache, encode_prompts, losses
from memflow.modes import own_modes
from memflow.parallel import ALONE, Alone
from memflow.parallel.ranks import Ranks
from memflow.stream.chunks import ChunkDriver
from memflow.stream.given import check_recorded, one_seed_each, prompt_seconds, whole_pixels
from memflow.stream.plan import Plan, prompt_texts
from memflow.stream.sampler import DistilledSchedule
from memflow.stream.saved import load_stream
from memflow.stream.stream import Stream

_GONE = {
    "toy": "the preset 'toy' is called 'storybook' now",
    "noise": "the preset 'noise' has left memflow: memflow_bench.untrained.noise_pipeline() makes it",
}
_UNTRIED = "its exchanges have not been tried in graphs"


@dataclass
class MemFlowOutput(BaseOutput):
    """frames: [B, T, H, W, 3] uint8. latents: [B, C, F, h, w] float32."""

    frames: Tensor
    latents: Tensor


class MemFlowPipeline(DiffusionPipeline, WanLoraLoaderMixin):
    """Text to video, streamed, with a memory of the past frames that the coming prompt calls for.

    Args:
        tokenizer: that of text_encoder.
        text_encoder: of the T5 family.
        transformer: WanTransformer3DModel, distilled for few-step causal generation.
        vae: AutoencoderKLWan or an `IndependentCodec`.
        scheduler: a diffusers flow-matching scheduler, the source of the noise levels.
        denoising_steps: its unshifted timesteps that are used.
        fps: video frames per second.
        text_length: tokens that a prompt is padded to.
        height: of the video in pixels, by default.
        width: likewise.
        memory: fields of the `MemoryConfig` that this model was trained for; its defaults where not given.
        first_denoising_steps: those of a stream's first chunk; None = denoising_steps.

    Attributes:
        prompts: None, or a `PromptCache` that is asked for embeddings in the encoder's place.

    Example:
        >>> from memflow import MemFlowPipeline
        >>> pipe = MemFlowPipeline.from_preset("storybook")
        >>> chunk = next(pipe.stream(["bo, a red ball, jumps on the beach."], seconds_per_prompt=1.5))
        >>> chunk.frames.shape  # batch, frames, height, width, colours
        torch.Size([1, 3, 512, 512, 3])
    """

    prompts: PromptCache | None = None
    ranks: Alone = ALONE
    model_cpu_offload_seq = "text_encoder->transformer->vae"

    def __init__(
        self,
        tokenizer,
        text_encoder,
        transformer,
        vae,
        scheduler,
        denoising_steps: list | tuple = (1000, 750, 500, 250),
        fps: float = 16.0,
        text_length: int = 512,
        height: int = 480,
        width: int = 832,
        memory: dict | None = None,
        first_denoising_steps: list | tuple | None = None,
    ):
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer, text_encoder=text_encoder, transformer=transformer, vae=vae, scheduler=scheduler
        )
        self.register_to_config(
            denoising_steps=list(denoising_steps),
            first_denoising_steps=None if first_denoising_steps is None else list(first_denoising_steps),
            fps=fps,
            text_length=text_length,
            height=height,
            width=width,
            memory=dict(memory or {}),
        )
        check_recorded(fps, text_length, height, width, memory or {})
        _ = self.schedule, self.first_schedule  # which refuse what cannot work here and not in a chunk
        self.spatial_factor, self.cuda_graphs = stream_decoder(vae).spatial_factor, False

    @classmethod
    def from_preset(cls, name: str = "storybook", *, dtype: torch.dtype = torch.float32) -> MemFlowPipeline:
        """A model that comes with the package.

        Args:
            name: `storybook`: the model of examples/storybook, trained, a few megabytes.
            dtype: Of the weights, as in `from_pretrained`.

        Raises:
            MemFlowError: There is no model of this name in the package.
        """
        if name in PRESETS:
            how = "its weights are made into a folder with `memflow convert` (docs/models.md)"
            raise MemFlowError(f"preset {name!r} says how a model is run; {how}")
        if name != "storybook":
            raise MemFlowError(_GONE.get(name, f"there is no preset {name!r} in the package, only storybook"))
        return cls.from_pretrained(Path(__file__).parents[1] / "assets" / "storybook", dtype=dtype)

    @classmethod
    def load_config(cls, *arguments: Any, **options: Any) -> Any:
        """As diffusers' own; classes that a folder names by an older module are found where they are now."""
        found = super().load_config(*arguments, **options)
        config = found[0] if isinstance(found, tuple) else found
        if "vae" in config:
            config["vae"] = current_class(*config["vae"])
        return found

    @classmethod
    def from_pretrained(cls, *arguments: Any, **options: Any) -> MemFlowPipeline:
        """As diffusers' own, whatever torch is set to; torch's global random state is left as it was."""
        with own_modes(), torch.random.fork_rng(devices=[]):
            return super().from_pretrained(*arguments, **options)

    def use_preset(self, name: str) -> None:
        """Run as the published model `name` is run, whatever the folder recorded."""
        preset = find_preset(name)
        self.scheduler = preset.scheduler()
        self.register_to_config(**preset.settings())

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Text embeddings [B, T, text_dim] and mask [B, T] of one prompt, one text per batch row. Without gradients."""
        if self.prompts is not None:
            return self.prompts(list(texts))
        with own_modes():
            return encode_prompts(self.tokenizer, self.text_encoder, list(texts), self.config.text_length)

    @property
    def fps(self) -> float:
        """Video frames per second."""
        return self.config.fps

    @property
    def schedule(self) -> DistilledSchedule:
        """Noise levels of the denoising steps."""
        return DistilledSchedule(self.scheduler, self.config.denoising_steps)

    @property
    def first_schedule(self) -> DistilledSchedule:
        """Those of a stream's first chunk."""
        steps = self.config.first_denoising_steps
        return self.schedule if steps is None else DistilledSchedule(self.scheduler, steps, "first_denoising_steps")

    @property
    def memory_config(self) -> MemoryConfig:
        """The memory that this model was trained for."""
        return MemoryConfig.from_dict(self.config.memory)

    @property
    def frames_per_chunk(self) -> int:
        """Video frames in a chunk (a causal VAE gives fewer for the first)."""
        return self.memory_config.frames_per_chunk * stream_decoder(self.vae).temporal_factor

    def compile(self, *, graphs: bool = False, **options: Any) -> None:
        """Compile the blocks of the transformer, all of them with the same graphs: one for a first chunk, one for all
        that follow and one for prompt switches, whatever memory holds. For streams that are made from now on.

        Args:
            graphs: also replay passes, denoising and clean, as CUDA graphs, once the memory is full; needs a GPU, and
                weights that stay where they are.
            options: of torch.compile, `mode="max-autotune-no-cudagraphs"` for example.
        """
        if graphs:
            require_gpu(self.transformer)
        if self.ranks.size > 1:
            raise MemFlowError(f"compile: not with enable_parallelism; {_UNTRIED}")
        self.cuda_graphs = graphs
        self.transformer.compile_repeated_blocks(**{"fullgraph": True, "dynamic": True} | options)

    def enable_parallelism(self) -> None:
        """Make every story with all processes of torch.distributed's default group together, for good: each computes
        a part of the tokens outside self-attention and a part of the heads inside it, and has that part of the memory.

        To be called in all of them on a pipeline with the same weights, where it will stay, after
        `torch.distributed.init_process_group("cpu:gloo,cuda:nccl")` (or "gloo" without GPUs). What streams give is then
        as of one process; the first has the frames. docs/distributed.md has a program.

        Raises:
            MemFlowError: torch.distributed has not been initialised, the pipeline is compiled, or the number of
                processes does not divide the heads; a stream is refused where it does not divide its tokens.
        """
        if not torch.distributed.is_initialized():
            first = "torch.distributed.init_process_group comes first (torchrun starts such programs)"
            raise MemFlowError(f"enable_parallelism: {first}")
        ranks = Ranks()
        if ranks.size == 1 or self.ranks.size > 1:
            return
        if any(block._compiled_call_impl is not None for block in self.transformer.blocks):
            raise MemFlowError(f"enable_parallelism: not on a compiled pipeline; {_UNTRIED}")
        share(self.transformer, ranks)
        self.ranks = ranks

    def use_float8(self) -> list[str]:
        """Let the linear layers of the blocks compute in float8, weights and inputs; returns their names. See
        `memflow.models.wan.float8`. MemFlowError where that cannot be. Before `compile`."""
        return to_float8(self.transformer)

    def chunks_for(self, seconds: float) -> int:
        """Whole chunks nearest to `seconds` of video, at least one."""
        return max(1, round(prompt_seconds(seconds) * self.fps / self.frames_per_chunk))

    def whole_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """(height, width) of a video in pixels, the model's own where None; MemFlowError for what it cannot make."""
        row, column = (self.spatial_factor * step for step in self.transformer.config.patch_size[1:])
        height = whole_pixels("height", self.config.height if height is None else height, row)
        return height, whole_pixels("width", self.config.width if width is None else width, column)

    def stream(
        self,
        prompts: Sequence[str] | Sequence[Sequence[str]],
        *,
        seconds_per_prompt: float = 10.0,
        height: int | None = None,
        width: int | None = None,
        seed: int | Sequence[int] = 0,
        memory: MemoryConfig | None = None,
    ) -> Stream:
        """A generator of chunks that tells the story of `prompts`.

        Args:
            prompts: one text per prompt; for a batch of stories one list of texts (one per story) per prompt.
            seconds_per_prompt: length of every prompt's part of the video.
            height: of the video in pixels; the model's own where not given.
            width: likewise.
            seed: of the first story; the next ones in a batch count on from it. Or one seed per story.
            memory: what is remembered; the model's own where not given.

        Raises:
            MemFlowError: an argument that cannot be, named.
        """
        if not isinstance(prompts, (list, tuple)) or not prompts:
            raise MemFlowError(f"prompts must be a list of at least one prompt, got {prompts!r}")
        batch = len(prompts[0]) if isinstance(prompts[0], (list, tuple)) else 1
        texts = [prompt_texts(prompt, batch) for prompt in prompts]
        height, width = self.whole_size(height, width)
        plan, seeds = Plan(texts, self.chunks_for(seconds_per_prompt)), one_seed_each(seed, batch)
        config = self.memory_config if memory is None else memory
        stream = Stream(self, plan=plan, config=config, seeds=seeds, height=height, width=width)
        self.warn_of_losses(text for row in texts for text in row)
        return stream

    def driver(self, memory: MemoryConfig, seeds: Sequence[int], height: int, width: int) -> ChunkDriver:
        """The model and its memory for stories of one size (pixels of the video) and of these seeds, one for each;
        without text, sampler and video."""
        driver = ChunkDriver(WanModel(self.transformer, cuda_graphs=self.cuda_graphs), memory, seeds=seeds)
        driver.open(len(seeds), height // self.spatial_factor, width // self.spatial_factor)
        return driver

    def decoder(self) -> StreamDecoder:
        """A decoder at the start of a video: latents to frames, chunk by chunk."""
        return stream_decoder(self.vae)

    def resume(self, path: str | Path) -> Stream:
        """The stream that `Stream.save` wrote to `path`; its next chunks are those of the uninterrupted one."""
        return load_stream(self, path, Stream, WanModel)

    def __call__(self, prompts: Sequence[str] | Sequence[Sequence[str]], **settings: Any) -> MemFlowOutput:
        """The whole video at once. Arguments as in `stream`."""
        chunks = list(self.progress_bar(self.stream(prompts, **settings)))
        return MemFlowOutput(
            frames=torch.cat([chunk.frames for chunk in chunks], dim=1),
            latents=torch.cat([chunk.latents for chunk in chunks], dim=2),
        )

    def warn_of_losses(self, prompts: Iterable[str]) -> None:
        """Warn, with a MemFlowWarning, of what does not reach the model: ends cut off, words it does not know."""
        for loss in losses(self.tokenizer, prompts, self.config.text_length):
            warnings.warn(loss, MemFlowWarning, stacklevel=3)

"""The published models, one row each: their files, licence and sizes, and how their own pipelines run them.

Repositories and file names are those of the projects' own READMEs and hub pages (docs/models.md says which). How a
model is run no checkpoint says. MemFlow: the published code and configurations, as docs/memory.md describes them.
LongLive: its window of 12 latent frames and sink of 3 (https://arxiv.org/abs/2509.22622), no bank. Self-Forcing: 21
latent frames are kept (https://arxiv.org/abs/2506.08009), neither sink nor bank. Causal Forcing: the same, a frame at a
time (https://arxiv.org/abs/2602.02214), and Causal Forcing++ (https://arxiv.org/abs/2605.15141) in one or two steps,
four for the first frame. Krea Realtime: three frames are kept besides the chunk of three; its configuration does not
shift the timesteps. LongLive 2 (https://arxiv.org/abs/2605.18739): Wan 2.2 5B, chunks of 8 latent frames, 32 of them
seen, 8 as the sink, sampled as in its distillation (its demo takes a multistep solver, and another sink for every shot:
neither is served).

Neither torch nor diffusers is imported before it is needed: help texts and completion list these names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from memflow.errors import MemFlowError
from memflow.models.wan import WAN_2_2_VAE

if TYPE_CHECKING:
    from diffusers import FlowMatchEulerDiscreteScheduler

    from memflow.memory.config import MemoryConfig


@dataclass(frozen=True)
class Repository:
    """Files of one repository on the Hugging Face hub."""

    name: str  # owner and repository
    files: tuple[str, ...]  # patterns of file names
    licence: str  # as far as it is known here; the model card is what counts


@dataclass(frozen=True)
class Preset:
    """Everything that a pipeline records beside its models."""

    memory: Mapping[str, object] = field(default_factory=dict)  # fields of `MemoryConfig`
    # Which of the two sets in a checkpoint the published pipeline runs, the trained ones ("generator": `use_ema: false`
    # in its configuration) or their moving average ("generator_ema").
    weights: str = "generator_ema"
    denoising_steps: tuple[int, ...] = (1000, 750, 500, 250)  # unshifted timesteps
    first_denoising_steps: tuple[int, ...] | None = None  # of the first chunk, where it has others
    shift: float = 5.0  # of the flow-matching schedule
    fps: float = 16.0  # video frames per second
    text_length: int = 512  # tokens that a prompt is padded to
    size: tuple[int, int] = (480, 832)  # height and width of the video in pixels
    lora: tuple[int, float] | None = None  # rank and alpha of the published adapter, which does not say alpha itself

    @property
    def memory_config(self) -> MemoryConfig:
        """The memory of the published pipeline."""
        from memflow.memory.config import MemoryConfig

        return MemoryConfig(**self.memory)

    def scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        """The source of the noise levels."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=self.shift)

    def settings(self) -> dict:
        """The settings of a `MemFlowPipeline`, by their names there."""
        return {
            "denoising_steps": list(self.denoising_steps),
            "first_denoising_steps": self.first_denoising_steps and list(self.first_denoising_steps),
            "fps": self.fps,
            "text_length": self.text_length,
            "height": self.size[0],
            "width": self.size[1],
            "memory": self.memory_config.to_dict(),
        }


_1_3B = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30}
_5B = {"num_attention_heads": 24, "attention_head_dim": 128, "ffn_dim": 14336, "num_layers": 30} | dict.fromkeys(
    ("in_channels", "out_channels"), 48
)
_14B = {"num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824, "num_layers": 40}
_UMT5_XXL = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}


@dataclass(frozen=True)
class PublishedModel:
    """A row of the table."""

    repositories: tuple[Repository, ...]
    preset: Preset | None = None  # how it is run; None = a base model: diffusers runs it, it is no few-step generator
    # Configurations, where they differ from the library's defaults.
    transformer: Mapping[str, object] = field(default_factory=_1_3B.copy)
    text_encoder: Mapping[str, int] = field(default_factory=_UMT5_XXL.copy)
    vae: Mapping[str, object] = field(default_factory=dict)


_TEXT = "models_t5_umt5-xxl-enc-bf16.pth"
_PARTS = (_TEXT, "Wan2.1_VAE.pth", "google/umt5-xxl/*")  # the same for both sizes
_WAN = Repository("Wan-AI/Wan2.1-T2V-1.3B", _PARTS, "Apache-2.0")
_WHOLE = ("diffusion_pytorch_model*.safetensors", *_PARTS)
_NONCOMMERCIAL = "CC BY-NC-SA 4.0: no commercial use"
_UNKNOWN = "see its card"
_FRAMEWISE = {"policy": "none", "frames_per_chunk": 1, "sink_frames": 0, "window_frames": 21}
_LONGLIVE = "Efficient-Large-Model/LongLive-1.3B"

MODELS: Mapping[str, PublishedModel] = {
    "memflow-1.3b": PublishedModel(
        (_WAN, Repository("KlingTeam/MemFlow", ("base.pt", "lora.pt"), "not stated on its card")),
        Preset({"published_mode": "interactive", "record_interval": 3}, weights="generator", lora=(256, 256.0)),
    ),
    "longlive-1.3b": PublishedModel(
        (_WAN, Repository(_LONGLIVE, ("models/longlive_base.pt", "models/lora.pt"), _NONCOMMERCIAL)),
        Preset({"policy": "none", "sink_frames": 3, "window_frames": 9}, weights="generator", lora=(256, 256.0)),
    ),
    "longlive-infinity-1.3b": PublishedModel(  # the same files, with positions by distance
        (_WAN, Repository(_LONGLIVE, ("models/longlive_base.pt", "models/lora.pt"), _NONCOMMERCIAL)),
        Preset(
            {"policy": "none", "sink_frames": 3, "window_frames": 9, "positions": "relative"},
            weights="generator",
            lora=(256, 256.0),
        ),
    ),
    "self-forcing-1.3b": PublishedModel(
        (_WAN, Repository("gdhe17/Self-Forcing", ("checkpoints/self_forcing_dmd.pt",), _NONCOMMERCIAL)),
        Preset({"policy": "none", "sink_frames": 0, "window_frames": 21}),
    ),
    "causal-forcing-framewise-1.3b": PublishedModel(
        (_WAN, Repository("zhuhz22/Causal-Forcing", ("framewise/causal_forcing.pt",), _UNKNOWN)), Preset(_FRAMEWISE)
    ),
    "causal-forcing-2step-1.3b": PublishedModel(
        (_WAN, Repository("zhuhz22/Causal-Forcing", ("causal-forcing++/framewise-2step.pt",), _UNKNOWN)),
        Preset(_FRAMEWISE, denoising_steps=(1000, 500), first_denoising_steps=Preset.denoising_steps),
    ),
    "causal-forcing-1step-1.3b": PublishedModel(
        (_WAN, Repository("zhuhz22/Causal-Forcing", ("causal-forcing++/framewise-1step.pt",), _UNKNOWN)),
        Preset(_FRAMEWISE, denoising_steps=(1000,), first_denoising_steps=Preset.denoising_steps),
    ),
    "krea-realtime-14b": PublishedModel(  # its timesteps are shifted already
        (_WAN, Repository("krea/krea-realtime-video", ("krea-realtime-video-14b.safetensors",), _UNKNOWN)),
        Preset(
            {"policy": "none", "sink_frames": 0, "window_frames": 6}, denoising_steps=(1000, 937, 833, 625), shift=1.0
        ),
        transformer=_14B,
    ),
    "longlive2-5b": PublishedModel(
        (
            Repository("Wan-AI/Wan2.2-TI2V-5B", (_TEXT, "Wan2.2_VAE.pth", "google/umt5-xxl/*"), "Apache-2.0"),
            Repository("Efficient-Large-Model/LongLive-2.0-5B", ("model_bf16.pt",), _UNKNOWN),
        ),
        Preset(
            {"policy": "none", "frames_per_chunk": 8, "sink_frames": 8, "window_frames": 24},
            weights="generator",
            fps=24.0,
            size=(704, 1280),
            lora=(128, 128.0),
        ),
        transformer=_5B,
        vae=WAN_2_2_VAE,
    ),
    "wan2.1-t2v-1.3b": PublishedModel((Repository("Wan-AI/Wan2.1-T2V-1.3B", _WHOLE, "Apache-2.0"),)),
    "wan2.1-t2v-14b": PublishedModel((Repository("Wan-AI/Wan2.1-T2V-14B", _WHOLE, "Apache-2.0"),), transformer=_14B),
}
PRESETS: Mapping[str, Preset] = {name: model.preset for name, model in MODELS.items() if model.preset}


def find_preset(name: str) -> Preset:
    """The preset of this name. Raises MemFlowError, with those that there are, for another name."""
    if name not in PRESETS:
        raise MemFlowError(f"there is no preset {name!r} of a published model; there are {', '.join(PRESETS)}")
    return PRESETS[name]

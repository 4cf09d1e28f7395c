"""How the published models are run: schedule, window, sink, bank, and what their pipelines do with them.

The checkpoints do not say any of it. Numbers of MemFlow: the published code and configurations, as docs/memory.md
describes them. LongLive: its window of 12 latent frames and sink of 3 (https://arxiv.org/abs/2509.22622), no bank.
Self-Forcing: a cache of 21 latent frames (https://arxiv.org/abs/2506.08009), neither sink nor bank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from diffusers import FlowMatchEulerDiscreteScheduler

from memflow.errors import MemFlowError
from memflow.memory.config import MemoryConfig


@dataclass(frozen=True)
class Preset:
    """Everything that a pipeline records beside its models.

    memory: that of the published pipeline. paper_top_k: what the paper activates (`--top-k`); the released
    configurations leave activation off. weights: which of the two sets in a checkpoint the published pipeline runs, the
    trained ones ("generator": `use_ema: false` in its configuration) or their moving average ("generator_ema").
    denoising_steps: unshifted timesteps. shift: of the flow-matching schedule.
    """

    memory: MemoryConfig
    paper_top_k: int | None = None
    weights: str = "generator_ema"
    denoising_steps: tuple[int, ...] = (1000, 750, 500, 250)
    shift: float = 5.0
    fps: float = 16.0
    text_length: int = 512
    size: tuple[int, int] = field(default=(480, 832))  # height and width in pixels

    def scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=self.shift)

    def settings(self) -> dict:
        """The settings of a `MemFlowPipeline`, by their names there."""
        return {
            "denoising_steps": list(self.denoising_steps),
            "fps": self.fps,
            "text_length": self.text_length,
            "height": self.size[0],
            "width": self.size[1],
            "memory": self.memory.to_dict(),
        }


PRESETS: Mapping[str, Preset] = {
    "memflow-1.3b": Preset(
        MemoryConfig.published("interactive", record_interval=3), paper_top_k=3, weights="generator"
    ),
    "longlive-1.3b": Preset(MemoryConfig(policy="none", sink_frames=3, window_frames=9), weights="generator"),
    "self-forcing-1.3b": Preset(MemoryConfig(policy="none", sink_frames=0, window_frames=21)),
}


def find_preset(name: str) -> Preset:
    if name not in PRESETS:
        raise MemFlowError(f"there is no preset {name!r} of a published model; there are {', '.join(PRESETS)}")
    return PRESETS[name]

"""`python -m examples.storybook train`: the storybook pipeline from a seed, in three stages, each resumable.

Codec; story model, on the latents of the codec's encoder, which is left alone from then on; the codec's decoder again.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from examples.storybook import model, train_codec, train_model
from examples.storybook.card import card
from examples.storybook.progress import Run, worker
from memflow.errors import MemFlowError


def train(
    out: Path,
    *,
    seed: int = 0,
    steps: int = train_model.STEPS,
    codec_steps: int = train_codec.STEPS,
    minutes: float | None = None,
    resume: bool = False,
    device: torch.device | None = None,
) -> Path | None:
    """Train in the folder `out`; returns the folder of the finished pipeline, None if `minutes` were over before.

    steps: of the story model. codec_steps: of the codec, of which the first three quarters come before it. minutes:
    stop after so long. resume: go on where `out` stands. Under torchrun the workers share every step.
    """
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        dist.init_process_group("gloo")
    stop_at = None if minutes is None else time.monotonic() + 60 * minutes
    if not resume and any(out.glob("*/checkpoint.pt")):
        raise MemFlowError(f"{out} holds a training run: --resume goes on with it, or name another folder")
    parts = model.build(seed)
    for name in ("vae", "transformer", "text_encoder"):
        parts[name].to(device or "cpu")
    codec = train_codec.codec_run(parts["vae"], out / "codec", seed, codec_steps)
    codec.resume()
    codec.go(stop_at, stop_step=train_codec.frozen_at(codec_steps))
    if codec.step < train_codec.frozen_at(codec_steps):
        return None
    trainer = train_model.Trainer(parts, seed, steps)
    stories = trainer.run(out / "stories")
    stories.resume()
    stories.go(stop_at)
    codec.go(stop_at)
    if worker()[0]:
        return None
    plot_losses([codec, stories], out / "loss.png")
    if not (stories.done and codec.done):
        return None
    return save(parts, out / "model", card(parts, seed=seed, steps=steps, codec_steps=codec_steps))


def save(parts: dict[str, object], folder: Path, text: str) -> Path:
    """Write trained components as a pipeline that `MemFlowPipeline.from_pretrained` loads, in half precision.

    text: its model card.
    """
    from memflow import MemFlowPipeline

    finished = model.build(0)
    for name in ("vae", "transformer", "text_encoder"):
        # A fresh model: the trained transformer has the attention and the position module of training.
        finished[name].load_state_dict(parts[name].state_dict())
        finished[name].eval().half()
    MemFlowPipeline(**finished, **model.settings()).save_pretrained(folder)
    (folder / "README.md").write_text(text)
    return folder


def plot_losses(runs: list[Run], path: Path) -> None:
    """The logged numbers of every run over its steps, running means, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(runs), figsize=(6 * len(runs), 3.6), squeeze=False)
    for axis, run in zip(axes[0], runs, strict=True):
        for name in run.rows[0] if run.rows else ():
            values = torch.tensor([row[name] for row in run.rows])
            width = max(1, len(values) // 50)
            smooth = nn.functional.avg_pool1d(values[None, None], width, 1)[0, 0] if len(values) > width else values
            axis.plot(range(width - 1, width - 1 + len(smooth)), smooth, label=name)
        axis.set(title=run.title, xlabel="step", yscale="log")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)

"""`python -m examples.storybook train`: the storybook pipeline from a seed, in three stages, each resumable.

Codec; story model, on the latents of the codec's encoder, which is left alone from then on; the codec's decoder again.
"""

from __future__ import annotations

import os
import platform
import textwrap
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from examples.storybook import model, train_stories
from examples.storybook.drawing import COLOURS, PLACES, SHAPES
from examples.storybook.training_run import Run, average_gradients, learning_rate, step_generator, worker
from examples.storybook.world import ACTIONS, NAMES, Frame, character_mask, frame_count, landmark_mask, render
from memflow import __version__
from memflow.decoders.independent import StorybookCodec
from memflow.errors import MemFlowError

CODEC_STEPS = 2400
CODEC_BATCH = 32
_RATE = 2.5e-3
_LATENT_NOISE = 0.1  # standard deviation, beside latents of 1: what a generator leaves must not show
_CHARACTER, _LANDMARK = 16.0, 4.0  # weights; the rest of the picture has 1. Characters differ the most and are small


def train(
    out: Path,
    *,
    seed: int = 0,
    steps: int = train_stories.STEPS,
    codec_steps: int = CODEC_STEPS,
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
    codec = codec_run(parts["vae"], out / "codec", seed, codec_steps)
    codec.resume()
    codec.go(stop_at, stop_step=frozen_at(codec_steps))
    if codec.step < frozen_at(codec_steps):
        return None
    trainer = train_stories.Trainer(parts, seed, steps)
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


def frozen_at(steps: int) -> int:
    """Steps before the encoder stays as it is, so that the story model can be trained on its latents."""
    return steps * 3 // 4


def codec_run(
    codec: StorybookCodec, folder: Path, seed: int, steps: int = CODEC_STEPS, batch: int = CODEC_BATCH
) -> Run:
    """The training run of `codec`, on its device, with checkpoints in `folder`. batch: frames over all workers."""
    rank, workers = worker()
    optimizer = torch.optim.AdamW(codec.parameters(), lr=_RATE, betas=(0.9, 0.98), weight_decay=0.01)

    def advance(step: int) -> dict[str, float]:
        generator = step_generator(seed, step * workers + rank)
        frame = Frame.of(torch.randint(frame_count(), (batch // workers,), generator=generator))
        pictures, weight = (x.to(codec.device) for x in (render(frame), _weight(frame)))
        for group in optimizer.param_groups:
            group["lr"] = _RATE * learning_rate(step, steps)
        frozen = step >= frozen_at(steps)
        codec.train(not frozen)
        with torch.set_grad_enabled(not frozen):
            latents = codec.encode(pictures)
        latents = latents + _LATENT_NOISE * torch.randn(latents.shape, generator=generator).to(latents)
        error = codec.decode_frames(latents) - pictures
        loss = (weight * (error.square() + 0.1 * error.abs())).mean()
        loss.backward()
        average_gradients(codec.parameters())
        torch.nn.utils.clip_grad_norm_(codec.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        codec.eval()
        return {"loss": loss.item(), "psnr": -10 * error.detach().square().mean().log10().item()}

    return Run("codec", folder, {"codec": codec, "optimizer": optimizer}, steps, advance)


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


def card(parts: dict, *, seed: int, steps: int, codec_steps: int) -> str:
    """The card of trained components."""
    trained = [parts[name] for name in ("vae", "transformer", "text_encoder")]
    command = f"python -m examples.storybook train -o run --seed {seed} --steps {steps} --codec-steps {codec_steps}"
    template = (Path(__file__).parent / "card.md").read_text()
    text = template.format(
        places=len(PLACES),
        names=len(NAMES),
        colours=len(COLOURS),
        shapes=len(SHAPES),
        parameters=sum(parameter.numel() for part in trained for parameter in part.parameters()),
        name_list=", ".join(NAMES),
        colour_list=", ".join(COLOURS),
        shape_list=", ".join(SHAPES),
        action_list=", ".join(ACTIONS),
        command=command,
        seed=seed,
        steps=steps,
        codec_steps=codec_steps,
        stories=train_stories.STORIES,
        chunks=train_stories.CHUNKS,
        shift=model.SHIFT,
        blur=train_stories.CONTEXT_NOISE,
        memflow=__version__,
        torch=_version("torch"),
        diffusers=_version("diffusers"),
        transformers=_version("transformers"),
        python=platform.python_version(),
    )
    return _wrapped(text)


def _wrapped(text: str) -> str:
    """Paragraphs of at most 120 columns; the head between the first two `---` and indented lines stay."""
    head, body = text.split("---\n\n", 1)
    parts = [part if part.startswith(("    ", "#")) else textwrap.fill(part, 120) for part in body.split("\n\n")]
    return head + "---\n\n" + "\n\n".join(parts) + "\n"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


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


def _weight(frame: Frame) -> Tensor:
    """[n, SIZE, SIZE, 1]"""
    character = character_mask(frame.shape, frame.mood, frame.step)
    character = nn.functional.max_pool2d(character, 9, stride=1, padding=4)  # outline, eyes and feet too
    return (1 + (_CHARACTER - 1) * character + (_LANDMARK - 1) * landmark_mask()[frame.place]).unsqueeze(-1)

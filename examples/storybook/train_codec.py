"""Training of the storybook's autoencoder on random frames of the world."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from examples.storybook.progress import Run, average_gradients, learning_rate, step_generator, worker
from examples.storybook.world import Frame, character_mask, frame_count, landmark_mask, render
from memflow.decoders.storybook import StorybookCodec

STEPS = 2400
BATCH = 32
_RATE = 2.5e-3
_LATENT_NOISE = 0.1  # standard deviation, beside latents of 1: what a generator leaves must not show
_CHARACTER, _LANDMARK = 16.0, 4.0  # weights; the rest of the picture has 1. Characters differ the most and are small


def frozen_at(steps: int) -> int:
    """Steps before the encoder stays as it is, so that the story model can be trained on its latents."""
    return steps * 3 // 4


def codec_run(codec: StorybookCodec, folder: Path, seed: int, steps: int = STEPS, batch: int = BATCH) -> Run:
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


@torch.no_grad()
def encode_frames(codec: StorybookCodec, numbers: Tensor) -> Tensor:
    """Latents of frames given by `Frame.number`: numbers [...] on the CPU -> [..., channels, 8, 8] on its device."""
    different, where = numbers.unique(return_inverse=True)
    return codec.encode(render(Frame.of(different)).to(codec.device))[where.to(codec.device)]


def _weight(frame: Frame) -> Tensor:
    """[n, SIZE, SIZE, 1]"""
    character = character_mask(frame.shape, frame.mood, frame.step)
    character = nn.functional.max_pool2d(character, 9, stride=1, padding=4)  # outline, eyes and feet too
    return (1 + (_CHARACTER - 1) * character + (_LANDMARK - 1) * landmark_mask()[frame.place]).unsqueeze(-1)

"""The model card that lies beside trained weights."""

from __future__ import annotations

import platform
import textwrap
from importlib.metadata import PackageNotFoundError, version

from examples.storybook.drawing import COLOURS, PLACES, SHAPES
from examples.storybook.world import ACTIONS, NAMES
from memflow import __version__

_TEXT = """---
license: apache-2.0
library_name: diffusers
tags: [text-to-video, streaming, memory]
---

# The storybook model

A picture-book world of {places} places, {names} names, {colours} colours and {shapes} shapes, told chunk by chunk
by a tiny model of the real architecture: diffusers' `WanTransformer3DModel` (dim 128, 4 heads, 4 layers, feed-forward
512), a two-layer T5 encoder over words, and an autoencoder from 128 x 128 pixels to 16 x 8 x 8 latents. All of it is
{parameters:,} parameters, in float16. It is there to try and to measure memory with, and has no other use.

What it understands: `<name>, a <colour> <shape>, <action> <place>.` to introduce somebody, then
`<name> <action> <place>.` Names: {name_list}. Colours: {colour_list}. Shapes: {shape_list}. Actions: {action_list}.
Places: on the beach, on the mountain, in the meadow, in the forest, in the desert, in the village. Other words are one
unknown token. Every place has a landmark whose colour the story makes up; no prompt can name it.

## Training

    {command}

Seed {seed}; {codec_steps} steps of the autoencoder (its encoder is left alone after three quarters of them), {steps}
steps of transformer and text encoder, {stories} stories of {chunks} chunks each. All data is drawn in code
(`examples.storybook.world`). Made with memflow {memflow}, torch {torch}, diffusers {diffusers},
transformers {transformers}, Python {python}.

Method: teacher forcing with the memory in the loop (sink 3, window 9, bank of 0, 3 or 6 past frames at random slots),
velocity prediction, noise shifted by {shift:g}, up to {blur:g} noise on the frames that are remembered, a read-out of
the name from text keys, frame means and queries, and a retrieval loss on the score that the memory ranks frames by.

Measured: `python -m examples.storybook evaluate`. Licence: Apache-2.0, weights and pictures.
"""


def card(parts: dict, *, seed: int, steps: int, codec_steps: int) -> str:
    """The card of trained components."""
    from examples.storybook import train_model
    from examples.storybook.model import SHIFT

    models = [parts[name] for name in ("vae", "transformer", "text_encoder")]
    text = _TEXT.format(
        places=len(PLACES),
        names=len(NAMES),
        colours=len(COLOURS),
        shapes=len(SHAPES),
        parameters=sum(parameter.numel() for model in models for parameter in model.parameters()),
        name_list=", ".join(NAMES),
        colour_list=", ".join(COLOURS),
        shape_list=", ".join(SHAPES),
        action_list=", ".join(ACTIONS),
        command=f"python -m examples.storybook train -o run --seed {seed} --steps {steps} --codec-steps {codec_steps}",
        seed=seed,
        steps=steps,
        codec_steps=codec_steps,
        stories=train_model.STORIES,
        chunks=train_model.CHUNKS,
        shift=SHIFT,
        blur=train_model.CONTEXT_NOISE,
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

"""Which past frames a policy still shows when they are needed: stories as drawn, nothing generated.

The model reads the true frames of a story, one clean pass per chunk, and its memory is updated as in a stream. So the
question is the memory's alone: does the bank show a frame of the character and of the place that the prompt names,
where neither sink nor window does?
"""

from __future__ import annotations

import numpy as np
import torch

from examples.storybook.evaluate import Setting
from examples.storybook.model import GRID
from examples.storybook.statistics import Share
from examples.storybook.stories import CHUNK, Story, training_story
from examples.storybook.train_codec import encode_frames
from memflow.memory import Prompt, make_memory
from memflow.models.wan.adapter import WanModel
from memflow.models.wan.text import encode_prompts

CHUNKS = 24
MEASURES = ("character", "place", "both")


class Rehearsal:
    """Random stories of CHUNKS chunks, their prompts and their latents, to be read under one setting after another."""

    def __init__(self, pipeline, stories: int, seed: int):
        self.pipeline = pipeline
        self.model = WanModel(pipeline.transformer)
        random = np.random.default_rng([seed, CHUNKS])
        told = [training_story(random, CHUNKS) for _ in range(stories)]
        self.seeds = [seed * 1_000_000 + row for row in range(stories)]
        self.scenes = [[story.scenes[i] for i in story.scene_of_chunks()] for story in told]
        texts = [_texts(story) for story in told]
        numbers = torch.from_numpy(np.stack([story.frames() for story in told]))
        with torch.no_grad():
            self.prompts = [self._prompt([row[chunk] for row in texts]) for chunk in range(CHUNKS)]
            self.latents = encode_frames(pipeline.vae, numbers).transpose(1, 2).to(pipeline.transformer.dtype)

    def _prompt(self, texts: list[str]) -> Prompt:
        pipe = self.pipeline
        embeds, mask = encode_prompts(pipe.tokenizer, pipe.text_encoder, texts, pipe.config.text_length)
        return self.model.encode_prompt(embeds.to(pipe.transformer.dtype), mask)

    @torch.no_grad()
    def read(self, setting: Setting) -> dict[str, list[Share]]:
        """Hits over chunks 0 to CHUNKS - 1, for each of MEASURES ("both" where both were away).

        A chunk counts where the character (the place) was seen before, and neither sink nor window shows it.
        """
        config = setting.config(self.pipeline.memory_config)
        model = self.model
        memory = make_memory(
            config,
            layers=model.layers,
            heads=model.heads,
            head_dim=model.head_dim,
            batch=len(self.seeds),
            grid=GRID,
            dtype=model.dtype,
            device=model.device,
            seeds=self.seeds,
        )
        shares = {name: [Share(0, 0)] * CHUNKS for name in MEASURES}
        for chunk, prompt in enumerate(self.prompts):
            start = chunk * CHUNK
            memory.update(start, prompt)
            shown = memory.snapshot(start, prompt).recalled[-1]  # [B, bank]
            for row, frames in zip(self.scenes, shown, strict=True):
                for name, hit in _hits(row, chunk, config, frames).items():
                    shares[name][chunk] += (hit, 1)
            step = memory.pass_over(start, CHUNK, prompt)
            model.write_clean(self.latents[:, :, start : start + CHUNK], step)
            memory.end_chunk(start)
        return shares


def _hits(scenes: list, chunk: int, config, frames: np.ndarray) -> dict[str, bool]:
    """Whether `frames` show what `chunk` needs, by measure; a measure is left out where nothing was away."""
    window = range(max(0, chunk + 1 - config.window_frames // CHUNK), chunk)
    in_view = {*window, *range(min(chunk, config.sink_frames // CHUNK))}
    shown = {int(frame) // CHUNK for frame in frames if frame >= 0}
    found = {}
    for name, key in (("character", "name"), ("place", "place")):
        right = {i for i in range(chunk) if getattr(scenes[i], key) == getattr(scenes[chunk], key)}
        if right and not right & in_view:
            found[name] = bool(right & shown)
    if len(found) == 2:
        found["both"] = all(found.values())
    return found


def _texts(story: Story) -> list[str]:
    """The prompt in force, for each chunk."""
    prompts = story.prompts()
    return [prompts[i] for i in story.scene_of_chunks()]

"""`python -m examples.storybook evaluate`: settings, lengths, seeds; JSON that grows as it goes, a table, plots."""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from examples.storybook.model import encode_frames
from examples.storybook.recall import MEASURES, Setting, Share, evaluate, total
from examples.storybook.stories import CHUNK, LENGTHS, Script, training_script
from memflow.models.wan.adapter import WanModel
from memflow.models.wan.text import encode_prompts
from memflow.stream.chunks import ChunkDriver

CHUNKS = 24
HITS = ("character", "place", "both")
COMPARED = ("colour", "shape", "landmark")
_RETRIEVAL = ("none", "fifo", "random", "published", "published, bank of 6", "diverse", "original", "archive")


class Rehearsal:
    """Random stories of CHUNKS chunks, their prompts and their latents, to be read under one setting after another."""

    def __init__(self, pipeline, stories: int, seed: int):
        self.pipeline = pipeline
        random = np.random.default_rng([seed, CHUNKS])
        told = [training_script(random, CHUNKS) for _ in range(stories)]
        self.seeds = [seed * 1_000_000 + row for row in range(stories)]
        self.scenes = [[story.scenes[i] for i in story.scene_of_chunks()] for story in told]
        texts = [_texts(story) for story in told]
        numbers = torch.from_numpy(np.stack([story.frames() for story in told]))
        with torch.no_grad():
            self.texts = [self._encode([row[chunk] for row in texts]) for chunk in range(CHUNKS)]
            self.latents = encode_frames(pipeline.vae, numbers).transpose(1, 2)

    def _encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        pipe = self.pipeline
        return encode_prompts(pipe.tokenizer, pipe.text_encoder, texts, pipe.config.text_length)

    def read(self, setting: Setting) -> dict[str, list[Share]]:
        """Hits over chunks 0 to CHUNKS - 1, for each of HITS ("both" where both were away).

        A chunk counts where the character (the place) was seen before, and neither sink nor window shows it.
        """
        config = setting.config(self.pipeline.memory_config)
        driver = ChunkDriver(WanModel(self.pipeline.transformer), config, seeds=self.seeds)
        shares = {name: [Share(0, 0)] * CHUNKS for name in HITS}
        for chunk, (embeds, mask) in enumerate(self.texts):
            start = chunk * CHUNK
            driver.prompt(embeds, mask)
            driver.keep(self.latents[:, :, start : start + CHUNK])
            shown = driver.snapshot().recalled[-1]  # [B, bank]
            for row, frames in zip(self.scenes, shown, strict=True):
                for name, hit in _hits(row, chunk, config, frames).items():
                    shares[name][chunk] += (hit, 1)
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


def _texts(script: Script) -> list[str]:
    """The prompt in force, for each chunk."""
    prompts = script.prompts()
    return [prompts[i] for i in script.scene_of_chunks()]


def run(pipeline, path: Path, *, stories: int, seeds: int, settings: list[Setting], say=print) -> dict:
    """Evaluate and write `path` after every setting; what it holds already is kept. Returns what it then holds.

    stories: of each length, over all seeds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(path.read_text()) if path.exists() else {"recall": {}, "retrieval": {}}
    results["about"] = {
        "stories": dict.fromkeys(LENGTHS, stories),
        "seeds": seeds,
        "scenes between": LENGTHS,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "command": f"python -m examples.storybook evaluate --stories {stories} --seeds {seeds}",
    }
    each = -(-stories // seeds)
    rehearsals: list[Rehearsal] = []
    for setting in settings:
        for length in LENGTHS:
            if setting.label in results["recall"].get(length, {}):
                continue
            begin = time.perf_counter()
            parts = [evaluate(pipeline, setting, length, each, seed) for seed in range(seeds)]
            results["recall"].setdefault(length, {})[setting.label] = _merge(parts)
            _write(results, path)
            say(
                f"{setting.label}, {length}: {_summary(results['recall'][length][setting.label])}, "
                f"{time.perf_counter() - begin:.0f} s"
            )
        if setting.label in _RETRIEVAL and setting.label not in results["retrieval"]:
            rehearsals = rehearsals or [Rehearsal(pipeline, each, seed) for seed in range(seeds)]
            parts = [rehearsal.read(setting) for rehearsal in rehearsals]
            results["retrieval"][setting.label] = {
                name: [total([part[name][chunk] for part in parts]).to_dict() for chunk in range(CHUNKS)]
                for name in parts[0]
            }
            _write(results, path)
    return results


def _merge(parts: list[dict]) -> dict:
    shares = {name: total([part["shares"][name] for part in parts]).to_dict() for name in MEASURES}
    mean = {name: sum(part[name] for part in parts) / len(parts) for name in ("seconds", "chance")}
    return {"shares": shares, **mean}


def _summary(row: dict) -> str:
    return ", ".join(f"{name} {row['shares'][name]['value']:.2f}" for name in COMPARED)


def _write(results: dict, path: Path) -> None:
    path.write_text(json.dumps(results, indent=1))

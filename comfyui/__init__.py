"""Nodes for ComfyUI (V3 API): load a model, tell a story into images, see what was remembered.

This folder, or a link to it, goes into ComfyUI's `custom_nodes`; the package itself into its Python, with the extra
`model`. See README.md beside this file.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from comfy.model_management import throw_exception_if_processing_interrupted
from comfy_api.latest import ComfyAPISync, ComfyExtension, io
from PIL import Image

from memflow import MemFlowPipeline
from memflow.cli.loading import choose_memory
from memflow.cli.options import MEMORIES
from memflow.output.report import MemoryReport

Pipeline = io.Custom("MEMFLOW_PIPELINE")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_MODELS_OWN = "the model's own"
_STORY = "bo, a red star, jumps on the beach.\nmia, a blue ball, waits in the village.\nbo waits in the village."


class LoadModel(io.ComfyNode):
    """A preset of the package, or a folder that `memflow convert` wrote."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        gpu = torch.cuda.is_available()
        return io.Schema(
            node_id="MemFlow_LoadModel",
            display_name="MemFlow: load a model",
            category="MemFlow",
            description="A video model with a memory: the small one inside the package, or a converted folder.",
            inputs=[
                io.String.Input("model", default="storybook", tooltip="storybook, or a folder of `memflow convert`"),
                io.Combo.Input("dtype", options=list(_DTYPES), default="bfloat16" if gpu else "float32"),
                io.Combo.Input("device", options=["cuda", "cpu"] if gpu else ["cpu"], default="cuda" if gpu else "cpu"),
            ],
            outputs=[Pipeline.Output(display_name="pipeline")],
        )

    @classmethod
    def execute(cls, model: str, dtype: str, device: str) -> io.NodeOutput:
        load = MemFlowPipeline.from_pretrained if Path(model).is_dir() else MemFlowPipeline.from_preset
        return io.NodeOutput(load(model, dtype=_DTYPES[dtype]).to(device))


class TellStory(io.ComfyNode):
    """Prompts to images, chunk by chunk, and the picture of what was remembered."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MemFlow_TellStory",
            display_name="MemFlow: tell a story",
            category="MemFlow",
            description="Every line is a prompt. Who and what was in earlier prompts comes back from memory.",
            inputs=[
                Pipeline.Input("pipeline"),
                io.String.Input("story", multiline=True, default=_STORY, tooltip="one prompt per line"),
                io.Float.Input("seconds_per_prompt", default=1.5, min=0.1, max=600.0, step=0.1),
                io.Int.Input("seed", default=0, min=0, max=2**53 - 1, control_after_generate=True),
                io.Combo.Input(
                    "memory",
                    options=[_MODELS_OWN, *MEMORIES],
                    default=_MODELS_OWN,
                    tooltip="which past frames are kept",
                ),
                io.Int.Input(
                    "top_k", default=0, min=0, max=1024, tooltip="frames a head attends to; 0: the model's own"
                ),
            ],
            outputs=[
                io.Image.Output(display_name="images"),
                io.Float.Output(display_name="fps"),
                io.Image.Output(display_name="memory report"),
            ],
        )

    @classmethod
    def execute(
        cls, pipeline: MemFlowPipeline, story: str, seconds_per_prompt: float, seed: int, memory: str, top_k: int
    ) -> io.NodeOutput:
        policy = None if memory == _MODELS_OWN else memory
        prompts = [line.strip() for line in story.splitlines() if line.strip()]
        stream = pipeline.stream(
            prompts,
            seconds_per_prompt=seconds_per_prompt,
            seed=seed,
            memory=choose_memory(policy, None, top_k or None, pipeline.memory_config),
        )
        report, images, progress = MemoryReport("A story", pipeline.fps), [], ComfyAPISync().execution
        chunks = len(stream)
        for chunk in stream:
            throw_exception_if_processing_interrupted()
            images.append(chunk.frames[0].float() / 255)
            report.add(chunk, stream.snapshot())
            progress.set_progress(value=chunk.index + 1, max_value=chunks)
        return io.NodeOutput(torch.cat(images), pipeline.fps, _picture(report))


def _picture(report: MemoryReport) -> torch.Tensor:
    """[1, H, W, 3], from 0 to 1."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "report.png")
        report.save(path)
        with Image.open(path) as picture:
            return torch.from_numpy(np.asarray(picture.convert("RGB")).copy()).unsqueeze(0).float() / 255


class MemFlowExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [LoadModel, TellStory]


async def comfy_entrypoint() -> MemFlowExtension:
    """What ComfyUI calls."""
    return MemFlowExtension()

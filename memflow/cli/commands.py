"""The options of the command `memflow`. What takes long to import is imported by the command that needs it."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from memflow.cli import models as model_commands
from memflow.cli.models import Dtype

app = typer.Typer(
    help="Stories that stream out as video and remember who was in them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command()(model_commands.convert)
app.command()(model_commands.download)
_STORY, _MEMORY, _RUN = "Story", "Memory", "Running and pausing"


class Memory(str, Enum):
    """What decides which frames are remembered."""

    prompt = "prompt"
    fifo = "fifo"
    diverse = "diverse"
    original = "original"
    archive = "archive"
    none = "none"
    reference = "reference"


def _version(wanted: bool) -> None:
    if wanted:
        from memflow import __version__

        typer.echo(f"memflow {__version__}")
        raise typer.Exit


@app.callback()
def _memflow(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it and end.")
    ] = False,
) -> None:
    pass


@app.command()
def generate(
    story: Annotated[
        Path | None,
        typer.Argument(
            metavar="STORY",
            help='A .jsonl file with one {"prompts": \\[...]} per line, or a text file with one prompt per line.',
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="OUT", help="The .mp4 to write; a folder if STORY holds several stories."
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "-p", "--prompt", metavar="TEXT", help="A prompt, once for each, in place of STORY.", rich_help_panel=_STORY
        ),
    ] = None,
    seconds_per_prompt: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="Length of each prompt's part. \\[default: 10]", rich_help_panel=_STORY),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Seed of the noise. \\[default: 0]", rich_help_panel=_STORY)
    ] = None,
    height: Annotated[
        int | None,
        typer.Option(min=1, metavar="PIXELS", help="Of the video. \\[default: the model's]", rich_help_panel=_STORY),
    ] = None,
    width: Annotated[
        int | None,
        typer.Option(min=1, metavar="PIXELS", help="Of the video. \\[default: the model's]", rich_help_panel=_STORY),
    ] = None,
    memory: Annotated[
        Memory | None,
        typer.Option(
            help="What is remembered: frames that the prompts call for, the newest, those least alike (the latest of "
            "each kind, or the original), all of them (in host memory), only first frames and window, or as the "
            "published code has it. \\[default: the model's]",
            rich_help_panel=_MEMORY,
        ),
    ] = None,
    held: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Past frames that are held; attention sees the most relevant of them. \\[default: as many as it sees]",
            rich_help_panel=_MEMORY,
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Remembered frames that each attention head looks at. \\[default: the model's; all of them for most]",
            rich_help_panel=_MEMORY,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="A preset, or a folder of a saved pipeline. \\[default: storybook]",
            rich_help_panel=_RUN,
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Run the model as memflow-1.3b, longlive-1.3b or self-forcing-1.3b. \\[default: what its folder says]",
            rich_help_panel=_RUN,
        ),
    ] = None,
    decoder: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A TAEHV checkpoint that decodes in place of the model's VAE, for real time. \\[default: the VAE]",
            rich_help_panel=_RUN,
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="cpu, cuda, cuda:1, ... \\[default: cuda where there is one]", rich_help_panel=_RUN
        ),
    ] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="Number format. \\[default: bfloat16 on a GPU, float32 on a CPU]", rich_help_panel=_RUN),
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(
            help="Kernels to use, one that `memflow doctor` lists. \\[default: the fastest]", rich_help_panel=_RUN
        ),
    ] = None,
    prompt_cache: Annotated[
        bool,
        typer.Option(
            "--prompt-cache/--no-prompt-cache",
            help="Keep the embeddings of prompts on disk: the text encoder is loaded for new prompts only.",
            rich_help_panel=_RUN,
        ),
    ] = True,
    report: Annotated[
        bool, typer.Option("--report", help="Also draw what was remembered: OUT with .png.", rich_help_panel=_RUN)
    ] = False,
    chunks: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Stop after so many chunks; with --save-state: pause there.", rich_help_panel=_RUN
        ),
    ] = None,
    save_state: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Where to keep what --resume needs, written at the end and on Ctrl-C.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Go on from a saved state. Story, seed and memory come from it; an OUT that is there is continued.",
            rich_help_panel=_RUN,
        ),
    ] = None,
) -> None:
    """Make the video of a story, written chunk by chunk while it is made."""
    from memflow.cli.generate import Request, generate

    request = Request(
        story=story,
        output=output,
        prompts=prompt or None,
        seconds_per_prompt=seconds_per_prompt,
        seed=seed,
        height=height,
        width=width,
        memory=memory and memory.value,
        held=held,
        top_k=top_k,
        model=model,
        preset=preset,
        decoder=decoder,
        device=device,
        dtype=dtype and dtype.value,
        backend=backend,
        prompt_cache=prompt_cache,
        report=report,
        chunks=chunks,
        save_state=save_state,
        resume=resume,
    )
    raise typer.Exit(generate(request))


@app.command()
def doctor(
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="What this folder or preset takes of a GPU, computed from its shapes."),
    ] = None,
    height: Annotated[int | None, typer.Option(min=1, metavar="PIXELS", help="Of the video.")] = None,
    width: Annotated[int | None, typer.Option(min=1, metavar="PIXELS", help="Of the video.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Number format. \\[default: bfloat16]")] = None,
    gpu: Annotated[
        str | None, typer.Option(metavar="NAME", help="A card such as rtx-4090, or GiB. \\[default: those present]")
    ] = None,
) -> None:
    """Show what this machine can run, and why not the rest; with --model, what a model needs."""
    if model is None:
        from memflow.cli.doctor import collect, show

        show(collect())
        return
    from memflow.cli.model_doctor import examine

    examine(model, height=height, width=width, dtype=dtype and dtype.value, gpu=gpu)

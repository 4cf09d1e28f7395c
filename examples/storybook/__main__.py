"""The options of `python -m examples.storybook`. What takes long to import is imported by the command that needs it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="The storybook model: train it, and measure what its memory brings back.", no_args_is_help=True)


@app.command()
def train(
    out: Annotated[
        Path, typer.Option("-o", "--out", metavar="FOLDER", help="Checkpoints, logs, the model at the end.")
    ],
    seed: Annotated[int, typer.Option(metavar="N", help="Of the weights and of all examples.")] = 0,
    steps: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Of the story model. [default: as shipped]")
    ] = None,
    codec_steps: Annotated[
        int | None, typer.Option(min=4, metavar="N", help="Of the autoencoder. [default: as shipped]")
    ] = None,
    minutes: Annotated[float | None, typer.Option(metavar="N", help="Stop after so long; --resume goes on.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in FOLDER.")] = False,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="cpu, cuda, ... [default: cuda where there is one]")
    ] = None,
) -> None:
    """Train the storybook model from a seed."""
    from examples.storybook.train import train as train_stages
    from memflow.cli.loading import choose_device

    given = {"steps": steps, "codec_steps": codec_steps}
    folder = train_stages(
        out,
        seed=seed,
        minutes=minutes,
        resume=resume,
        device=choose_device(device),
        **{name: value for name, value in given.items() if value is not None},
    )
    typer.echo(f"trained: {folder}" if folder else f"stopped: --resume goes on in {out}")


@app.command()
def evaluate(
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FILE.json", help="A table and plots go beside it.")],
    model: Annotated[
        str, typer.Option(metavar="NAME", help="A preset, or the folder of a trained model.")
    ] = "storybook",
    stories: Annotated[int, typer.Option(min=1, metavar="N", help="Of each length.")] = 102,
    seeds: Annotated[int, typer.Option(min=1, metavar="N", help="That the stories are spread over.")] = 3,
    memory: Annotated[
        list[str] | None, typer.Option(metavar="LABEL", help="One of the memories, once for each. [default: all]")
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="cpu, cuda, ... [default: cuda where there is one]")
    ] = None,
) -> None:
    """Tell stories under every policy and measure who and what comes back after an absence."""
    from examples.storybook import recall, report
    from examples.storybook.evaluate import run
    from memflow.cli.loading import choose_device, choose_dtype, load_pipeline
    from memflow.errors import MemFlowError

    if out.suffix != ".json":
        raise MemFlowError(f"-o must name a .json file, which a table and plots are written beside; got {out}")
    try:
        settings = recall.settings_named(memory)
    except ValueError as error:
        raise MemFlowError(f"--memory: {error}") from None
    chosen = choose_device(device)
    pipeline = load_pipeline(model, chosen, choose_dtype("float32", chosen))
    found = run(pipeline, out, stories=stories, seeds=seeds, settings=settings, say=typer.echo)
    out.with_suffix(".md").write_text(report.table(found))
    report.plot(found, out.with_suffix(".png"))
    report.plot_forgetting(found, out.with_name(out.stem + "-forgetting.png"))


@app.command()
def sheet(
    story: Annotated[Path, typer.Argument(metavar="STORY", help="As for `memflow generate`; the first story counts.")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FILE", help="A .png or .jpg.")],
    seconds_per_prompt: Annotated[float, typer.Option(metavar="SECONDS")] = 1.5,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the noise.")] = 0,
    columns: Annotated[int, typer.Option(min=1, metavar="N", help="Prompts side by side.")] = 2,
    memory: Annotated[
        str | None, typer.Option(metavar="POLICY", help="As for `memflow generate`. [default: the model's]")
    ] = None,
    model: Annotated[
        str, typer.Option(metavar="NAME", help="A preset, or a folder of a saved pipeline.")
    ] = "storybook",
) -> None:
    """Tell a story and draw it as a contact sheet: three frames of every prompt."""
    from examples.storybook.report import contact_sheet
    from memflow.cli.loading import choose_device, choose_dtype, choose_memory, load_pipeline
    from memflow.cli.story import read_stories

    prompts = read_stories(story)[0].prompts
    device = choose_device("cpu")
    pipeline = load_pipeline(model, device, choose_dtype(None, device))
    held = choose_memory(memory, None, None, pipeline.memory_config)
    contact_sheet(pipeline, prompts, out, seconds=seconds_per_prompt, seed=seed, columns=columns, memory=held)


if __name__ == "__main__":
    from memflow.cli import run_app

    raise SystemExit(run_app(app, None, "python -m examples.storybook"))

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


PARTS = ("policies", "retrieval", "generated", "activation", "endless")


@app.command()
def evaluate(
    out: Annotated[
        Path,
        typer.Option(
            "-o", "--out", metavar="FILE", help="Of policies a .json, a table and plots go beside it; else a .jsonl."
        ),
    ],
    part: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help=f"What is measured, once for each: {', '.join(PARTS)}. [default: policies]"),
    ] = None,
    model: Annotated[
        str, typer.Option(metavar="NAME", help="A preset, or the folder of a trained model.")
    ] = "storybook",
    stories: Annotated[
        int, typer.Option(min=1, metavar="N", help="Of policies of each length, else of each seed.")
    ] = 102,
    seeds: Annotated[int, typer.Option(min=1, metavar="N", help="That the stories are spread over.")] = 3,
    first_seed: Annotated[int, typer.Option(min=0, metavar="N", help="The others count on; not of policies.")] = 11,
    memory: Annotated[
        list[str] | None,
        typer.Option(metavar="LABEL", help="A policy, a rule or a kind of activation, once for each. [default: all]"),
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="cpu, cuda, ... [default: cuda where there is one]")
    ] = None,
) -> None:
    """Tell stories under every policy, or every rule of recall, and measure who and what comes back after an absence.

    Results are written as they come; started again with the same FILE it goes on.
    """
    from examples.storybook import recall, recall_report, report, retrieval, told
    from examples.storybook.evaluate import run
    from examples.storybook.results import Results
    from examples.storybook.rules import RULES
    from examples.storybook.told import ACTIVATED
    from memflow.cli.loading import choose_device, choose_dtype, choose_threads, load_pipeline
    from memflow.errors import MemFlowError

    parts = part or ["policies"]
    unknown = [name for name in parts if name not in PARTS]
    if unknown or ("policies" in parts and len(parts) > 1):
        raise MemFlowError(f"--part must be policies alone, or some of {', '.join(PARTS[1:])}; got {', '.join(parts)}")
    needed = ".json" if parts == ["policies"] else ".jsonl"
    if out.suffix != needed:
        raise MemFlowError(f"-o must name a {needed} file with --part {', '.join(parts)}; got {out}")
    known = [setting.label for setting in recall.SETTINGS] if parts == ["policies"] else [*RULES, *ACTIVATED]
    unknown = [label for label in memory or [] if label not in known]
    if unknown:
        raise MemFlowError(f"--memory: unknown: {', '.join(unknown)}; there are {', '.join(known)}")
    chosen = choose_device(device)
    pipeline = load_pipeline(model, chosen, choose_dtype("float32", chosen))
    if needed == ".json":
        settings = recall.settings_named(memory)
        found = run(pipeline, out, stories=stories, seeds=seeds, settings=settings, say=typer.echo)
        out.with_suffix(".md").write_text(report.table(found))
        report.plot(found, out.with_suffix(".png"))
        report.plot_forgetting(found, out.with_name(out.stem + "-forgetting.png"))
        return
    choose_threads(pipeline.transformer, chosen)
    chosen_seeds = list(range(first_seed, first_seed + seeds))
    for name in parts:
        command = f"python -m examples.storybook evaluate --part {name} --stories {stories} --seeds {seeds}"
        results = Results(out, f"{command} --first-seed {first_seed} -o {out.name}", say=typer.echo)
        measured = retrieval.run if name == "retrieval" else told.RUNS[name]
        measured(pipeline, results, stories=stories, seeds=chosen_seeds, labels=memory or known)
    out.with_suffix(".md").write_text(recall_report.table(results.lines))
    recall_report.plot(results.lines, out.with_suffix(".png"))


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

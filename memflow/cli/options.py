"""What the command `memflow` understands; every option stands here once. What is slow to import comes later."""

import inspect
from dataclasses import dataclass, fields, replace
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from memflow.errors import MemFlowError
from memflow.memory.config import RECALLS, SCENE_FRAMES
from memflow.memory.policies import POLICIES
from memflow.models.wan.published import MODELS, PRESETS

app = typer.Typer(
    help="Stories that stream out as video and remember who was in them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
MEMORIES = (*(name for name, policy in POLICIES.items() if not policy.by_hand), "published")
_SAID = {name: " ".join(policy.__doc__.split(".")[0].split()) for name, policy in POLICIES.items()}
_MEANING = "".join(f"{name}: {_SAID.get(name, 'What the published code does')}. " for name in MEMORIES)
_SAVED = ("Story", "Memory")  # a saved state knows what is under these headings, or marked with one of them


class Dtype(str, Enum):
    """Number format of weights, in a file or in memory."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Weights(str, Enum):
    """Which of the two sets in a training checkpoint."""

    generator = "generator"
    generator_ema = "generator_ema"


def _of(panel: str):
    """`typer.Option` whose help stands under the heading `panel`."""
    return lambda *names, **settings: typer.Option(*names, rich_help_panel=panel, **settings)


_story, _memory, _run, _many = (_of(panel) for panel in (*_SAVED, "Running and pausing", "Many stories"))


@dataclass(frozen=True)
class Request:
    """The options of `memflow generate`; None = not given. Those of the panels "Story" and "Memory" are in a state."""

    story: Annotated[
        Path | None,
        typer.Argument(
            metavar="STORY",
            help="A text file with one prompt per line, a .json or .yaml file with a list of prompts, or a .jsonl file "
            'with one {"prompts": \\[...]} per line. "-": lines or JSON from stdin.',
        ),
        "Story",
    ] = None
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="OUT", help="The .mp4 to write; a folder if STORY holds several."),
    ] = None
    prompts: Annotated[
        list[str] | None,
        _story("-p", "--prompt", metavar="TEXT", help="A prompt, once for each, in place of STORY."),
    ] = None
    seconds_per_prompt: Annotated[
        float | None, _story(metavar="SECONDS", help="Length of each prompt's part. \\[default: 10]")
    ] = None
    seed: Annotated[int | None, _story(metavar="N", help="Seed of the noise. \\[default: 0]")] = None
    height: Annotated[int | None, _story(min=1, metavar="PIXELS", help="Of the video. \\[default: the model's]")] = None
    width: Annotated[int | None, _story(min=1, metavar="PIXELS", help="Of the video. \\[default: the model's]")] = None
    memory: Annotated[
        str | None, _memory(metavar="NAME", help=_MEANING + "\\[default: the model's]", autocompletion=lambda: MEMORIES)
    ] = None
    held: Annotated[
        int | None,
        _memory(
            min=1,
            metavar="N",
            help="Past frames that are held; attention sees those that the prompt calls for. \\[default: the model's; "
            "with another --memory as many as it sees]",
        ),
    ] = None
    recall: Annotated[
        str | None,
        _memory(
            metavar="RULE",
            help="Which of them attention sees. relevance: the most relevant, each by itself. coverage: a set that "
            "covers the words of the prompt. \\[default: the model's]",
            autocompletion=lambda: RECALLS,
        ),
    ] = None
    scene_frame: Annotated[
        str | None,
        _memory(
            metavar="FRAME",
            help="Which held frames of a scene are preferred: any, first, or latest, where looks are meant to change. "
            "\\[default: the model's]",
            autocompletion=lambda: SCENE_FRAMES,
        ),
    ] = None
    top_k: Annotated[
        int | None,
        _memory(
            min=1,
            metavar="N",
            help="Remembered frames that each attention head looks at. \\[default: the model's; all of them for most]",
        ),
    ] = None
    activated: Annotated[
        float | None,
        _memory(
            min=0.0,
            metavar="SHARE",
            help="The same as a share of what is remembered and seen, 0.25 for example; above 1: a number of tokens.",
        ),
    ] = None
    activation_block: Annotated[
        int | None,
        _memory(
            min=1,
            metavar="TOKENS",
            help="A head chooses blocks of so many tokens, a row of a frame for example. \\[default: whole frames]",
        ),
    ] = None
    query_block: Annotated[
        int | None,
        _memory(
            min=1, metavar="TOKENS", help="Tokens of the new frames that choose together. \\[default: all of a head]"
        ),
    ] = None
    model: Annotated[
        str | None, _run(metavar="NAME", help="A preset, or a folder of a saved pipeline. \\[default: storybook]")
    ] = None
    preset: Annotated[
        str | None,
        _run(metavar="NAME", help="Run the model as one of the presets below. \\[default: what its folder says]"),
        "Story",
    ] = None
    decoder: Annotated[
        Path | None,
        _run(metavar="FILE", help="A TAEHV checkpoint that decodes in the VAE's place, for real time."),
        "Story",
    ] = None
    device: Annotated[
        str | None, _run(metavar="NAME", help="cpu, cuda, cuda:1, ... \\[default: cuda where there is one]")
    ] = None
    dtype: Annotated[
        Dtype | None, _run(help="Number format. \\[default: bfloat16 on a GPU, float32 on a CPU]"), "Story"
    ] = None
    backend: Annotated[
        str | None, _run(help="Kernels to use, one that `memflow doctor` lists. \\[default: the fastest]")
    ] = None
    prompt_cache: Annotated[
        bool,
        _run(
            "--prompt-cache/--no-prompt-cache",
            help="Keep the embeddings of prompts on disk: the text encoder is loaded for new prompts only.",
        ),
    ] = True
    live: Annotated[
        bool,
        _run(
            "--live",
            help="Read further prompts from stdin meanwhile: a line is the next scene, from the next chunk on.",
        ),
    ] = False
    report: Annotated[bool, _run("--report", help="Also draw what was remembered: OUT with .png.")] = False
    overwrite: Annotated[
        bool,
        _run(
            "--overwrite",
            help="Replace files that memflow did not make; with --jobs, films of other stories or settings.",
        ),
    ] = False
    chunks: Annotated[
        int | None, _run(min=1, metavar="N", help="Stop after so many chunks; with --save-state: pause there.")
    ] = None
    save_state: Annotated[
        Path | None,
        _run(metavar="FILE", help="Where to keep what --resume needs, written at the end, on Ctrl-C and on SIGTERM."),
    ] = None
    save_every: Annotated[
        int | None, _run(min=1, metavar="CHUNKS", help="Write the state after every so many chunks too.")
    ] = None
    resume: Annotated[
        Path | None,
        _run(
            metavar="FILE",
            help="Go on from a saved state. Story, seed and memory come from it; an OUT that is there is continued.",
        ),
    ] = None

    jobs: Annotated[
        int | None,
        _many(
            min=1,
            metavar="N",
            help="Tell the stories of STORY with N workers, each with a model of its own. OUT is a folder; films that "
            "are done are not made again, those begun go on. \\[default: with --ray as many as fit the cluster]",
        ),
    ] = None
    ray: Annotated[
        str | None,
        _many(
            metavar="ADDRESS",
            help="The workers are actors of a Ray cluster: at ADDRESS, else at RAY_ADDRESS, else the one that runs "
            "here, else one is started.",
        ),
    ] = None

    def further_memory(self) -> dict[str, object]:
        """The options that are fields of `MemoryConfig` by the same name."""
        named = ("recall", "scene_frame", "activated", "activation_block", "query_block")
        found = {name: getattr(self, name) for name in named}
        share = self.activated
        if share is not None and share > 1:
            if not share.is_integer():  # inf too
                raise MemFlowError(f"--activated {share:g}: must be a share of at most 1, or a whole number of tokens")
            found["activated"] = int(share)
        return found

    def given_again(self) -> list[str]:
        """The options that were given although a saved state knows them, as they are written on the command line."""
        return [self.written(name) for name in self.saved()]

    def saved(self) -> dict[str, Any]:
        """The options that were given and that a saved state knows, by name: what decides what a film shows."""
        known = {}
        for field in fields(self):
            _, about, *marks = get_args(field.type)
            value = getattr(self, field.name)
            if value not in (None, []) and {about.rich_help_panel, *marks} & {*_SAVED}:
                known[field.name] = value
        return known

    def written(self, name: str) -> str:
        """An option as it is written on the command line."""
        about = next(get_args(field.type)[1] for field in fields(self) if field.name == name)
        if isinstance(about.default, str):
            return about.default
        return "STORY" if name == "story" else "--" + name.replace("_", "-")


def lasting(model: str) -> str:
    """The name of a model, so that it is found again from another folder."""
    return str(Path(model).resolve()) if Path(model).is_dir() else model


def with_whole_paths(request):
    """A request of `generate` or `serve` for processes in other folders."""
    model = request.model and lasting(request.model)
    decoder = request.decoder and request.decoder.absolute()
    return replace(request, model=model, decoder=decoder)


def _reads(options: type):
    """Let typer read the options of a command from the fields of a dataclass, of which the command gets one."""

    def command(function):
        def run(**given):
            return function(options(**given))

        run.__name__, run.__doc__ = function.__name__, function.__doc__
        run.__signature__ = inspect.signature(options)
        run.__annotations__ = {field.name: field.type for field in fields(options)}
        return run

    return command


# In a column beside its option a long name would be cut.
_PRESETS = f"Presets: {', '.join(PRESETS)}"


def _late(place: str):
    """The function at "module:name", imported when its command runs, so that options are read without it."""
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


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


@app.command(epilog=_PRESETS)
@_reads(Request)
def generate(request: Request) -> int:
    """Make the video of a story, written chunk by chunk while it is made."""
    many = request.jobs is not None or request.ray is not None
    return _late("memflow.cli.many:generate_many" if many else "memflow.cli.generate:generate")(request)


@app.command(epilog=_PRESETS)
def convert(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="SOURCE...",
            help="Original files (.safetensors, .pth, .pt) or folders of them: transformer, VAE, UMT5 encoder and its "
            "tokenizer, LoRAs. What a file is shows in its tensors; of two transformers the later named counts.",
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="The folder to write.")],
    preset: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="How the model is run, recorded in FOLDER: one of those below."),
    ] = None,
    weights: Annotated[
        Weights | None,
        typer.Option(
            help="Of a checkpoint that holds both, the trained weights or their moving average. \\[default: what the "
            "preset's published pipeline runs, else generator_ema]"
        ),
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Number format to write. \\[default: that of the files]")] = None,
    lora_alpha: Annotated[
        float | None,
        typer.Option(
            metavar="ALPHA", help="The LoRA's scale is ALPHA / rank. \\[default: what its file says, else its rank]"
        ),
    ] = None,
    keep_lora: Annotated[
        bool,
        typer.Option("--keep-lora", help="Write the LoRA beside the weights instead of merging it into them."),
    ] = False,
    partial: Annotated[
        bool,
        typer.Option("--partial", help="Convert what is there and fits; what does not is listed and left out."),
    ] = False,
    heads: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Attention heads of the transformer. \\[default: of 128 channels each]"),
    ] = None,
    shard_gigabytes: Annotated[
        float, typer.Option(min=1e-4, metavar="GB", help="Size of the weight files, at most.")
    ] = 4.0,
) -> None:
    """Turn original checkpoint files into a folder for --model; an interrupted conversion continues."""
    _late("memflow.convert:convert")(
        _late("memflow.convert:Conversion")(
            sources=sources,
            output=output,
            preset=preset,
            weights=weights and weights.value,
            dtype=dtype and dtype.value,
            lora_alpha=lora_alpha,
            keep_lora=keep_lora,
            partial=partial,
            heads=heads,
            shard_bytes=round(shard_gigabytes * 10**9),
        )
    )


@app.command(epilog=f"Models: {', '.join(MODELS)}")
def download(
    name: Annotated[str, typer.Argument(metavar="NAME", help="One of those below.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="Where to put the files.")],
    yes: Annotated[bool, typer.Option("--yes", help="Accept the licences without being asked.")] = False,
) -> None:
    """Fetch published files from the Hugging Face hub, after showing licences and sizes; what is there stays."""
    _late("memflow.convert.download:download")(name, output, yes=yes)


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
    about = {"height": height, "width": width, "dtype": dtype and dtype.value, "gpu": gpu}
    _late("memflow.cli.doctor:doctor")(model, **about)

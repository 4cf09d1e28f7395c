"""The options of the command `memflow`: each stands here once, in the dataclass that its command gets."""

# ruff: noqa: RUF009 (every call makes a field of its own)

import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields, replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from memflow.errors import MemFlowError
from memflow.memory.config import RECALLS, SCENE_FRAMES
from memflow.memory.policies import OFFERED

MEMORIES = (*OFFERED, "published")
_MEANING = "".join(f"{name}: {OFFERED.get(name, 'What the published code does')}. " for name in MEMORIES)


class Dtype(str, Enum):
    """Number format of weights, in a file or in memory."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Weights(str, Enum):
    """Which of the two sets in a training checkpoint."""

    generator = "generator"
    generator_ema = "generator_ema"


def _under(panel: str | None = None, saved: bool = False, kind: Callable[..., Any] = typer.Option):
    """Makes fields of a command's options.

    Args:
        panel: heading that their help stands under.
        saved: whether a saved state knows them.
        kind: `typer.Option` or `typer.Argument`.
    """

    def option(metavar: str | None, help: str, *names: str, default: Any = None, saved: bool = saved, **more) -> Any:
        about = kind(*names, metavar=metavar, help=help, rich_help_panel=panel, **more)
        return field(default=default, metadata={"about": about, "saved": saved})

    return option


_option, _argument = _under(), _under(kind=typer.Argument)
_story, _memory = _under("Story", saved=True), _under("Memory", saved=True)
_run, _many, _server = _under("Running and pausing"), _under("Many stories"), _under("Serving")


def _again(name: str) -> Any:
    """The option of `Request` by this name, for another command."""
    known = Request.__dataclass_fields__[name]
    return field(default=known.default, metadata=known.metadata)


@dataclass(frozen=True)
class Request:
    """The options of `memflow generate`; None = not given."""

    story: Path | None = _argument(
        "STORY",
        "A text file with one prompt per line, a .json or .yaml file with a list of prompts, or a .jsonl file "
        'with one {"prompts": \\[...]} per line. "-": lines or JSON from stdin.',
        saved=True,
    )
    output: Path | None = _option("OUT", "The .mp4 to write; a folder if STORY holds several.", "-o", "--output")
    prompts: list[str] | None = _story("TEXT", "A prompt, once for each, in place of STORY.", "-p", "--prompt")
    seconds_per_prompt: float | None = _story("SECONDS", "Length of each prompt's part. \\[default: 10]")
    seed: int | None = _story("N", "Seed of the noise. \\[default: 0]")
    height: int | None = _story("PIXELS", "Of the video. \\[default: the model's]", min=1)
    width: int | None = _story("PIXELS", "Of the video. \\[default: the model's]", min=1)
    memory: str | None = _memory("NAME", _MEANING + "\\[default: the model's]", autocompletion=lambda: MEMORIES)
    held: int | None = _memory(
        "N",
        "Past frames that are held; attention sees those that the prompt calls for. \\[default: the model's; "
        "with another --memory as many as it sees]",
        min=1,
    )
    recall: str | None = _memory(
        "RULE",
        "Which of them attention sees. relevance: the most relevant, each by itself. coverage: a set that "
        "covers the words of the prompt. originals: such a set, of first appearances. \\[default: the model's]",
        autocompletion=lambda: RECALLS,
    )
    scene_frame: str | None = _memory(
        "FRAME",
        "Which held frames of a scene are preferred: any, first, or latest, where looks are meant to change; the last "
        "two with --recall coverage where the model's is originals. \\[default: the model's]",
        autocompletion=lambda: SCENE_FRAMES,
    )
    top_k: int | None = _memory(
        "N",
        "Remembered frames that each attention head looks at. \\[default: the model's; all of them for most]",
        min=1,
    )
    activated: float | None = _memory(
        "SHARE",
        "The same as a share of what is remembered and seen, 0.25 for example; above 1: a number of tokens.",
        min=0.0,
    )
    activation_block: int | None = _memory(
        "TOKENS",
        "A head chooses blocks of so many tokens, a row of a frame for example. \\[default: whole frames]",
        min=1,
    )
    query_block: int | None = _memory(
        "TOKENS", "Tokens of the new frames that choose together. \\[default: all of a head]", min=1
    )
    model: str | None = _run("NAME", "A preset, or a folder of a saved pipeline. \\[default: storybook]")
    preset: str | None = _run(
        "NAME", "Run the model as one of the presets below. \\[default: what its folder says]", saved=True
    )
    decoder: Path | None = _run(
        "FILE", "A TAEHV checkpoint that decodes in the VAE's place, for real time.", saved=True
    )
    device: str | None = _run("NAME", "cpu, cuda, cuda:1, ... \\[default: cuda where there is one]")
    dtype: Dtype | None = _run(None, "Number format. \\[default: bfloat16 on a GPU, float32 on a CPU]", saved=True)
    backend: str | None = _run(None, "Kernels to use, one that `memflow doctor` lists. \\[default: the fastest]")
    prompt_cache: bool = _run(
        None,
        "Keep the embeddings of prompts on disk: the text encoder is loaded for new prompts only.",
        "--prompt-cache/--no-prompt-cache",
        default=True,
    )
    live: bool = _run(
        None,
        "Read further prompts from stdin meanwhile: a line is the next scene, from the next chunk on.",
        "--live",
        default=False,
    )
    report: bool = _run(None, "Also draw what was remembered: OUT with .png.", "--report", default=False)
    overwrite: bool = _run(
        None,
        "Replace files that memflow did not make; with --jobs, films of other stories or settings.",
        "--overwrite",
        default=False,
    )
    chunks: int | None = _run("N", "Stop after so many chunks; with --save-state: pause there.", min=1)
    save_state: Path | None = _run(
        "FILE", "Where to keep what --resume needs, written at the end, on Ctrl-C and on SIGTERM."
    )
    save_every: int | None = _run("CHUNKS", "Write the state after every so many chunks too.", min=1)
    resume: Path | None = _run(
        "FILE", "Go on from a saved state. Story, seed and memory come from it; an OUT that is there is continued."
    )
    jobs: int | None = _many(
        "N",
        "Tell the stories of STORY with N workers, each with a model of its own. OUT is a folder; films that "
        "are done are not made again, those begun go on. \\[default: with --ray as many as fit the cluster]",
        min=1,
    )
    ray: str | None = _many(
        "ADDRESS",
        "The workers are actors of a Ray cluster: at ADDRESS, else at RAY_ADDRESS, else the one that runs "
        "here, else one is started.",
    )

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

    def saved(self) -> dict[str, Any]:
        """The options that were given and that a saved state knows, by name: what decides what a film shows."""
        known = {item.name: getattr(self, item.name) for item in fields(self) if item.metadata["saved"]}
        return {name: value for name, value in known.items() if value not in (None, [])}

    def given_again(self) -> list[str]:
        """The options that were given although a saved state knows them, as they are written on the command line."""
        return [self.written(name) for name in self.saved()]

    def written(self, name: str) -> str:
        """An option as it is written on the command line."""
        first = self.__dataclass_fields__[name].metadata["about"].default
        if isinstance(first, str):
            return first
        return "STORY" if name == "story" else "--" + name.replace("_", "-")


@dataclass(frozen=True)
class Serving:
    """The options of `memflow serve`; None = not given."""

    host: str = _server("ADDRESS", "Where to listen; other than this machine alone needs --token.", default="127.0.0.1")
    port: int = _server(None, "0: any that is free.", min=0, max=65535, default=8765)
    token: str | None = _server("SECRET", "What whoever uses the server must know.", envvar="MEMFLOW_SERVE_TOKEN")
    sessions: int = _server("N", "Stories told at the same time.", min=1, default=8)
    folder: Path | None = _server(
        "FOLDER", "Where films and states are kept. \\[default: in the user's cache]", "--dir"
    )
    allow_origin: list[str] | None = _server(
        "ORIGIN", "Another address of this server, or of a page that may use it. Repeatable."
    )
    ray: str | None = _server(
        "ADDRESS",
        "Serve from a Ray cluster: at ADDRESS, else at RAY_ADDRESS, else the one that runs here, else one is "
        "started. Its machines share --dir.",
    )
    replicas: int | None = _server("N", "Models of the cluster, each with --sessions. \\[default: 1]", min=1)
    model: str | None = _again("model")
    preset: str | None = _again("preset")
    decoder: Path | None = _again("decoder")
    device: str | None = _again("device")
    dtype: Dtype | None = _again("dtype")
    backend: str | None = _again("backend")
    prompt_cache: bool = _again("prompt_cache")


@dataclass(frozen=True)
class Converting:
    """The options of `memflow convert`."""

    sources: list[Path] = _argument(
        "SOURCE...",
        "Original files (.safetensors, .pth, .pt) or folders of them: transformer, VAE, UMT5 encoder and its "
        "tokenizer, LoRAs. What a file is shows in its tensors; of two transformers the later named counts.",
        default=MISSING,
    )
    output: Path = _option("FOLDER", "The folder to write.", "-o", "--output", default=MISSING)
    preset: str | None = _option("NAME", "How the model is run, recorded in FOLDER: one of those below.")
    weights: Weights | None = _option(
        None,
        "Of a checkpoint that holds both, the trained weights or their moving average. \\[default: what the "
        "preset's published pipeline runs, else generator_ema]",
    )
    dtype: Dtype | None = _option(None, "Number format to write. \\[default: that of the files]")
    lora_alpha: float | None = _option(
        "ALPHA", "The LoRA's scale is ALPHA / rank. \\[default: what its file says, else its rank]"
    )
    keep_lora: bool = _option(
        None, "Write the LoRA beside the weights instead of merging it into them.", "--keep-lora", default=False
    )
    partial: bool = _option(
        None, "Convert what is there and fits; what does not is listed and left out.", "--partial", default=False
    )
    heads: int | None = _option("N", "Attention heads of the transformer. \\[default: of 128 channels each]", min=1)
    shard_gigabytes: float = _option("GB", "Size of the weight files, at most.", min=1e-4, default=4.0)


@dataclass(frozen=True)
class Download:
    """The options of `memflow download`."""

    name: str = _argument("NAME", "One of those below.", default=MISSING)
    output: Path = _option("FOLDER", "Where to put the files.", "-o", "--output", default=MISSING)
    yes: bool = _option(None, "Accept the licences without being asked.", "--yes", default=False)


@dataclass(frozen=True)
class Needs:
    """The options of `memflow doctor`."""

    model: str | None = _option("NAME", "What this folder or preset takes of a GPU, computed from its shapes.")
    height: int | None = _option("PIXELS", "Of the video.", min=1)
    width: int | None = _option("PIXELS", "Of the video.", min=1)
    dtype: Dtype | None = _option(None, "Number format. \\[default: bfloat16]")
    gpu: str | None = _option("NAME", "A card such as rtx-4090, or GiB. \\[default: those present]")


def reads(options: type):
    """Let typer read the options of a command from the fields of a dataclass, of which the command gets one."""

    def command(function: Callable[[Any], Any]) -> Callable[..., Any]:
        def run(**given):
            return function(options(**given))

        about = {item.name: Annotated[item.type, item.metadata["about"]] for item in fields(options)}
        asked = inspect.signature(options).parameters.values()
        run.__signature__ = inspect.Signature([one.replace(annotation=about[one.name]) for one in asked])
        run.__name__, run.__doc__, run.__annotations__ = function.__name__, function.__doc__, about
        return run

    return command


def lasting(model: str) -> str:
    """The name of a model, so that it is found again from another folder."""
    return str(Path(model).resolve()) if Path(model).is_dir() else model


def with_whole_paths(request):
    """A request of `generate` or `serve` for processes in other folders."""
    model = request.model and lasting(request.model)
    decoder = request.decoder and request.decoder.absolute()
    return replace(request, model=model, decoder=decoder)

"""The options of the commands that deal with model files: `memflow convert` and `memflow download`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Dtype(str, Enum):
    """Number format of weights, in a file or in memory."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Weights(str, Enum):
    """Which of the two sets in a training checkpoint."""

    generator = "generator"
    generator_ema = "generator_ema"


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
        typer.Option(
            metavar="NAME",
            help="How the model is run, recorded in FOLDER: memflow-1.3b, longlive-1.3b or self-forcing-1.3b.",
        ),
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
    from memflow.convert import Conversion
    from memflow.convert import convert as run

    run(
        Conversion(
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


def download(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="memflow-1.3b, longlive-1.3b, self-forcing-1.3b, wan2.1-t2v-1.3b or wan2.1-t2v-14b.",
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="Where to put the files.")],
    yes: Annotated[bool, typer.Option("--yes", help="Accept the licences without being asked.")] = False,
) -> None:
    """Fetch published files from the Hugging Face hub, after showing licences and sizes; what is there stays."""
    from memflow.convert.download import download as run

    run(name, output, yes=yes)

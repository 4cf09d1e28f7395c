"""Names of files, and what a model card says, come from strangers: they reach a terminal escaped."""

from types import SimpleNamespace

from rich.console import Console
from safetensors.torch import save_file
from written import lora, transformer

from memflow.cli import main
from memflow.convert.download import Found, _show

HOSTILE = "\x1b]0;owned\x07\x9b2J\x7f"


def is_escaped(output, count):
    said = output.out + output.err
    return said.count("\\x1b]0;owned\\x07\\x9b2J\\x7f") == count and not {"\x1b", "\x07", "\x9b", "\x7f"} & {*said}


def test_what_is_converted(tmp_path, capsys):
    files = tmp_path / "files"
    files.mkdir()
    save_file(transformer(), files / f"model{HOSTILE}.safetensors")
    save_file(lora(3), files / f"lora{HOSTILE}.safetensors")
    (files / f"damaged{HOSTILE}.safetensors").write_bytes(b"nothing")
    assert main(["convert", str(files), "-o", str(tmp_path / f"out{HOSTILE}"), "--heads", "2", "--partial"]) == 0
    assert is_escaped(
        capsys.readouterr(), 5
    )  # left out; the LoRA's alpha is not known; the model, the LoRA, the folder


def test_what_is_downloaded(capsys):
    repository = SimpleNamespace(name="Wan", licence="MIT")
    _show([Found(repository, "1", {f"{HOSTILE}.pt": 1}, HOSTILE)], Console(stderr=True, highlight=False, markup=False))
    assert is_escaped(capsys.readouterr(), 2)

"""The command line as a person meets it: help, version, and one clear line for everything that is wrong."""

import json
import os
import shlex
import subprocess
import sys
from dataclasses import fields
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from memflow import __version__
from memflow.cli import main
from memflow.cli.options import MEMORIES, Request
from memflow.errors import install_command
from memflow.memory.policies import POLICIES
from memflow.models.wan.published import MODELS, PRESETS

GOOD = '{"prompts": ["a fox", "a hare"]}\n'


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a few files to go wrong with."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.jsonl").write_text(GOOD)
    (tmp_path / "two.jsonl").write_text(GOOD * 2)
    (tmp_path / "broken.jsonl").write_text(GOOD + '{"prompts": [\n')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "blank.jsonl").write_text('{"prompts": ["a", " "]}\n')
    (tmp_path / "none.jsonl").write_text('{"prompts": []}\n')
    (tmp_path / "deep.jsonl").write_text("[" * 100_000 + "\n")
    (tmp_path / "no.state").write_text("not a state")
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "not_a_model").mkdir()
    return tmp_path


def run(capsys, command):
    """Exit code and stderr of a command line, its words split at spaces."""
    code = main(command.split() if isinstance(command, str) else command)
    return code, capsys.readouterr().err


OUT = "-o out.mp4"
WRONG = {
    # the story
    f"generate {OUT}": "which story",
    f"generate good.jsonl -p x {OUT}": "not both",
    f"generate nothing.jsonl {OUT}": "nothing.jsonl: cannot be read: No such file",
    f"generate folder.mp4 {OUT}": "folder.mp4: is a folder",
    f"generate empty.jsonl {OUT}": "empty.jsonl: the file is empty",
    f"generate broken.jsonl {OUT}": "broken.jsonl, line 2: broken JSON",
    f"generate none.jsonl {OUT}": "none.jsonl, line 1: the story has no prompts",
    f"generate blank.jsonl {OUT}": "blank.jsonl, line 1: prompt 2 must be a text that is not blank",
    f"generate deep.jsonl {OUT}": "deep.jsonl, line 1: broken JSON: nested too deeply",
    # where it goes
    "generate good.jsonl": "-o OUT.mp4 is needed",
    "generate good.jsonl -o out.gif": "out.gif: only .mp4",
    "generate good.jsonl -o out": "out: only .mp4",
    "generate good.jsonl -o folder.mp4": "folder.mp4: is a folder",
    "generate good.jsonl -o none/out.mp4": "none/out.mp4: the folder none does not exist",
    "generate good.jsonl -o file/out.mp4": "file/out.mp4: cannot be written",
    "generate two.jsonl -o out.mp4": "holds 2 stories: -o must be a folder",
    "generate two.jsonl -o none/out": "none/out: the folder cannot be made",
    "generate two.jsonl -o file": "file: the folder cannot be made",
    f"generate good.jsonl {OUT} --save-state none/s": "none/s: the folder none does not exist",
    "generate two.jsonl -o out --save-state s": "--save-state is for one story",
    f"generate good.jsonl {OUT} --save-state out.mp4": "out.mp4: is named twice",
    f"generate good.jsonl {OUT} --save-state good.jsonl": "good.jsonl: is named twice",
    f"generate good.jsonl {OUT} --report --save-state ./out.png": "out.png: is named twice",
    f"generate good.jsonl {OUT} --save-state no.state": "no.state: is there and memflow did not make it",
    # settings
    f"generate good.jsonl {OUT} --top-k 0": "--top-k",
    f"generate good.jsonl {OUT} --top-k many": "--top-k",
    f"generate good.jsonl {OUT} --seed x": "--seed",
    f"generate good.jsonl {OUT} --seed 99999999999999999999": "seed must be a whole number from 0 to 2**63 - 1",
    f"generate good.jsonl {OUT} --seconds-per-prompt 1e300": "seconds_per_prompt must be above 0 and at most",
    f"generate good.jsonl {OUT} --height 128000 --width 128000": "cpu is out of memory",
    f"generate good.jsonl {OUT} --memory all": "--memory all: there is no such memory; there are prompt, fifo, diverse",
    f"generate good.jsonl {OUT} --memory oracle": "--memory oracle: there is no such memory",
    f"generate good.jsonl {OUT} --memory reference": "--memory reference is called --memory published now",
    f"generate good.jsonl {OUT} --model toy": "the preset 'toy' is called 'storybook' now",
    "toy train -o x": "`memflow toy` is `python -m examples.storybook` now",
    "doctor --gpu h100 --height 8": "--height, --gpu: only with --model NAME",
    f"generate good.jsonl {OUT} --dtype int8": "--dtype",
    f"generate good.jsonl {OUT} --chunks 0": "--chunks",
    f"generate good.jsonl {OUT} --height -1": "--height",
    f"generate good.jsonl {OUT} --height 33": "height must be a positive multiple of",
    f"generate good.jsonl {OUT} --seconds-per-prompt 0": "--seconds-per-prompt must be above 0",
    f"generate good.jsonl {OUT} --seconds-per-prompt nan": "--seconds-per-prompt must be above 0",
    f"generate good.jsonl {OUT} --seconds-per-prompt inf": "--seconds-per-prompt must be above 0",
    f"generate good.jsonl {OUT} --unknown": "--unknown",
    "generate one two -o out.mp4": "two",
    "nonsense": "nonsense",
    # the model and the machine
    f"generate good.jsonl {OUT} --model nope": "nope",
    f"generate good.jsonl {OUT} --model ./nope": "--model ./nope: there is no such folder",
    f"generate good.jsonl {OUT} --model not_a_model": "not_a_model: not the folder of a saved pipeline",
    f"generate good.jsonl {OUT} --device quantum": "--device quantum: no such kind of device",
    f"generate good.jsonl {OUT} --device meta": "--device meta: stories run on cpu and cuda",
    f"generate good.jsonl {OUT} --device cuda:99": "--device cuda:99: ",
    f"generate good.jsonl {OUT} --backend abacus": "--backend abacus: unknown",
    # resuming
    f"generate {OUT} --resume nothing.state": "nothing.state: cannot be read",
    f"generate {OUT} --resume no.state": "no.state cannot be read",
    f"generate good.jsonl {OUT} --resume no.state --seed 1": "leave out STORY, --seed",
    f"generate {OUT} --resume no.state -p x --memory fifo --dtype float16": "leave out -p, --memory, --dtype",
}


@pytest.mark.parametrize(("command", "message"), WRONG.items(), ids=WRONG)
def test_what_is_wrong_is_said_in_one_line(folder, capsys, command, message):
    before = sorted(folder.iterdir())
    code, error = run(capsys, command)
    assert code == 2
    assert message in error
    assert error.rstrip("\n").startswith("memflow: ") and error.count("\n") == 1, error
    assert sorted(path for path in folder.iterdir() if path.name != "out") == before


def test_a_blank_prompt_on_the_command_line(folder, capsys):
    assert run(capsys, ["generate", "-p", "a", "-p", " ", "-o", "out.mp4"]) == (
        2,
        "memflow: -p: prompt 2 must be a text that is not blank, got ' '\n",
    )


@pytest.mark.parametrize(
    ("command", "named"),
    [
        ("generate -p a -o out.mp4 --model ''", "--model"),
        ("generate -p a -o out.mp4 --preset=", "--preset"),
        ("generate -p a -o ''", "-o"),
        ("generate -p '' -o out.mp4", "-p"),
        ("generate '' -o out.mp4", "generate"),
        ("convert '' -o out", "convert"),
        ("convert . -o out --preset ''", "--preset"),
        ("serve --dir ''", "--dir"),
        ("doctor --model=", "--model"),
        ("''", "memflow"),
    ],
)
def test_an_empty_value_is_not_one_left_out(folder, capsys, command, named):
    """What a shell makes of a variable that is not set: the default model, or the folder one happens to be in."""
    said = f"memflow: {named}: an empty value came; a variable of the shell that is not set?\n"
    assert run(capsys, shlex.split(command)) == (2, said)
    assert not (folder / "out").exists()


def test_a_value_may_end_in_an_equals_sign(folder, capsys):
    """As texts in base64 do; and what came, a token, is not printed."""
    code, said = run(capsys, ["serve", "--token=c2VjcmV0dG9rZW4=", "--model", "nowhere"])
    assert code == 2 and "nowhere" in said and "c2VjcmV0" not in said


def test_cuda_without_a_gpu(folder, capsys, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, error = run(capsys, "generate good.jsonl -o out.mp4 --device cuda")
    assert code == 2 and "--device cuda: " in error and "memflow doctor" in error


def test_a_backend_that_cannot_run_says_why(folder, capsys, monkeypatch):
    from memflow.cli import loading

    monkeypatch.setattr(loading, "available_backends", lambda: {"torch": None, "cuda": "no compiler was found"})
    code, error = run(capsys, "generate good.jsonl -o out.mp4 --backend cuda")
    assert (code, error) == (2, "memflow: --backend cuda: no compiler was found\n")
    monkeypatch.setenv("MEMFLOW_BACKEND", "nonsense")
    code, error = run(capsys, "generate good.jsonl -o out.mp4")
    assert (code, error) == (2, "memflow: MEMFLOW_BACKEND nonsense: unknown; there are torch, cuda\n")


def test_help_and_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"memflow {__version__}\n"
    assert main(["generate", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for field in fields(Request):
        assert field.name in ("story", "prompts") or "--" + field.name.replace("_", "-") in said, field.name
    for name in MEMORIES:
        assert f" {name}: " in said
    for command, names in (("generate", PRESETS), ("download", MODELS)):
        assert main([command, "--help"]) == 0
        said = "".join(capsys.readouterr().out.replace("│", " ").split())
        assert all(name in said for name in names)


def test_the_memories_offered_are_the_policies():
    assert set(MEMORIES) == {*POLICIES, "published"} - {"oracle"}


def test_what_a_state_knows_is_refused_with_resume():
    """All options that shape what is made; those of where and how it runs may be given anew."""
    anew = {"output", "model", "device", "backend", "prompt_cache", "report", "overwrite", "chunks"}
    anew |= {"save_state", "save_every", "resume", "jobs", "ray", "live"}
    given = Request(**{field.name: "x" for field in fields(Request)}).given_again()
    assert given[:3] == ["STORY", "-p", "--seconds-per-prompt"] and "--top-k" in given
    assert len(given) == len(fields(Request)) - len(anew)
    assert Request(**dict.fromkeys(anew, "x")).given_again() == []
    assert Request(prompts=[], output=Path("a")).given_again() == []


@pytest.mark.parametrize("module", ["memflow", "memflow.cli"])
def test_the_package_runs_as_the_command(module):
    result = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, f"memflow {__version__}\n")


def test_shells_complete_names():
    """As a shell asks: the words so far, and which of them is to be completed."""
    code = "import sys; sys.argv = ['memflow']; from memflow.cli import run; run()"
    asked = {"_MEMFLOW_COMPLETE": "complete_bash", "COMP_WORDS": "memflow generate --memory p", "COMP_CWORD": "3"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | asked)
    assert result.stdout.split() == ["prompt", "published"]


ORIGINS = {
    "a checkout": ('{"url": "file:///a%20b/c", "dir_info": {"editable": true}}', "-e '/a b/c[model]'"),
    "a folder": ('{"url": "file:///a/c", "dir_info": {}}', "'/a/c[model]'"),
    "a wheel": ('{"url": "file:///a/c.whl", "archive_info": {}}', "'memflow-kernels[model] @ file:///a/c.whl'"),
    "git": ('{"url": "https://h/x.git", "vcs_info": {"vcs": "git"}}', "'memflow-kernels[model] @ git+https://h/x.git'"),
    "an index": (None, "'memflow-kernels[model]'"),
}


@pytest.mark.parametrize(("origin", "what"), ORIGINS.values(), ids=ORIGINS)
def test_what_is_missing_is_installed_from_where_the_package_came(monkeypatch, origin, what):
    found = SimpleNamespace(read_text=lambda name: origin)
    monkeypatch.setattr(metadata, "distribution", lambda name: found)
    assert install_command("model").endswith(f" {what}")


def test_the_python_interface_names_a_missing_extra():
    code = "import sys; sys.modules['diffusers'] = None\nfrom memflow import MemFlowPipeline"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    said = f"memflow.MemFlowPipeline: this needs the package 'diffusers': {install_command('model')}"
    assert result.stderr.splitlines()[-1] == f"ModuleNotFoundError: {said}"


CHECK = """
import json, sys
from memflow.cli import main
for name in {missing!r}:
    sys.modules[name] = None
code = main({arguments!r})
heavy = sorted({{"torch", "diffusers", "transformers", "matplotlib"}} & set(sys.modules))
print(json.dumps([code, heavy]), file=sys.stderr)
"""


def fresh(arguments, missing=()):
    """Exit code, heavy modules and stderr of `arguments` in a new process that lacks the packages `missing`."""
    code = CHECK.format(arguments=arguments, missing=missing)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    *error, last = result.stderr.splitlines()
    return *json.loads(last), "\n".join(error)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["generate", "--help"],
        ["generate", "none.jsonl", "-o", "a.mp4"],
        ["generate", "-p", " ", "-o", "a.mp4"],
    ],
)
def test_help_and_cheap_checks_load_no_model_libraries(arguments):
    code, heavy, _ = fresh(arguments)
    assert code == (0 if "--help" in arguments else 2)
    assert heavy == []


@pytest.mark.parametrize("package", ["typer", "rich", "av"])
def test_a_missing_extra_is_named(tmp_path, package):
    (tmp_path / "a.txt").write_text("a fox")
    code, _, error = fresh(["generate", str(tmp_path / "a.txt"), "-o", str(tmp_path / "a.mp4")], [package])
    assert code == 2
    assert error == f"memflow: this needs the package {package!r}: {install_command('model')}"


def test_a_missing_diffusers_is_named(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers.utils", None)
    code, error = run(capsys, "generate good.jsonl -o out.mp4")
    assert code == 2 and "memflow: this needs the package 'diffusers'" in error

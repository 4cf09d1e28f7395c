"""Providers and cases that a user brings, without editing anything; and what the docs say of them, as pasted."""

import json
import re
from pathlib import Path

import pytest

from memflow_bench import command
from memflow_bench.cases import load_cases, read_cases
from memflow_bench.providers.choice import chosen_providers
from memflow_bench.rows import read

DOCS = Path(__file__).parents[2] / "docs" / "benchmarks.md"
CEILING = {"flops": 1e12, "bytes": 1e11}
CASES = {
    "mine": {"like": "toy", "heads": 2, "grid": [2, 3], "text_tokens": 5},
    "mine-bank6": {"like": "mine", "bank": 6, "sweep": "memory"},
}
BROKEN = """
from memflow_bench.providers import Provider

class Broken(Provider):
    name = "broken"
    def attention(self, state):
        return lambda: state.query

class Elsewhere(Provider):
    name = "elsewhere"
    def means(self, state):
        raise AssertionError("not asked for")

class Nameless(Provider):
    def attention(self, state): ...

class Idle(Provider):
    name = "idle"

class Taken(Broken):
    name = "SDPA flash"

class Posing(Broken):
    name = "Ours (mine)"

class Slipping(Broken):
    name = " ours (torch)"

class Stranger:
    name = "stranger"

class Unmade(Broken):
    def __init__(self): raise OSError("no licence")
"""


def block(language: str, heading: str) -> str:
    """The first block of code in `language` below a heading of the page."""
    section = DOCS.read_text().split(f"## {heading}", 1)[1]
    return re.search(rf"```{language}\n(.*?)```", section, re.DOTALL)[1]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "ceilings", lambda *arguments: CEILING)
    monkeypatch.setattr(command.environment, "other_work", lambda: 0.0)
    (tmp_path / "broken.py").write_text(BROKEN)
    (tmp_path / "cases.json").write_text(json.dumps(CASES))
    monkeypatch.setattr(command, "own", lambda *arguments: [shortened(e) for e in OWN(*arguments)])
    return tmp_path


OWN = command.own


def shortened(experiment):
    return type(experiment)(**{**vars(experiment), "budget": 0.0})


def test_the_snippets_of_the_docs_run_as_pasted(folder, capsys):
    """An own provider on own cases, in the table, in the sweep and in its plot."""
    (folder / "mine.py").write_text(block("python", "Add a provider"))
    (folder / "cases.json").write_text(block("json", "Add a case"))
    wish = ["--providers", "mine.py:Mine", "published path", "--cases", "cases.json", "--workloads", "attention"]
    assert command.main(["run", "--device", "cpu", *wish, "-o", "mine.json"]) == 0
    found = read(folder / "mine.json")
    mine = [row for row in found.rows if row.provider == "mine"]
    assert {(row.status, row.reason) for row in mine} == {("ok", "")}
    assert len({row.case for row in mine}) >= 2
    assert "| mine | activated |" in capsys.readouterr().out
    assert command.main(["report", "mine.json"]) == 0
    assert (folder / "mine-sweep-memory.png").is_file()


def test_a_case_without_a_sweep_runs_with_the_defaults(folder, capsys):
    (folder / "one.json").write_text(json.dumps({"one": CASES["mine"]}))
    assert command.main(["run", "--device", "cpu", "--cases", "one.json", "--providers", "ours (torch)"]) == 0
    out = capsys.readouterr().out
    assert all(f"### {workload} one float32" in out for workload in ("attention", "means", "write", "update", "layer"))


def test_who_is_wrong_or_took_part_in_nothing_is_named(folder, capsys):
    wish = ["--providers", "broken.py:Broken", "broken.py:Elsewhere", "ours (torch)", "--workloads", "attention"]
    assert command.main(["run", "--device", "cpu", *wish, "--cases", "cases.json", "-o", "out.json"]) == 1
    out = capsys.readouterr().out
    assert re.search(r"\* broken - wrong: relative error", out)
    assert re.search(r"Took part in nothing.*: elsewhere", out)
    assert command.main(["report", "out.json"]) == 0


def test_a_sweep_from_a_case_of_the_package_has_its_base(folder):
    (folder / "bank.json").write_text(json.dumps({"far": {"like": "toy", "bank": 9, "sweep": "memory"}}))
    found = OWN(read_cases(folder / "bank.json", load_cases()), ["attention"], None, "cpu")
    assert [experiment.case.name for experiment in found] == ["toy", "far"]


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ("none.py:Mine", "there is no file none.py"),
        ("broken.py:Mine", "no such name in it"),
        ("broken.py:Stranger", "Stranger is not a memflow_bench.providers.Provider"),
        ("broken.py:Nameless", "Nameless needs a `name`"),
        ("broken.py:Idle", "Idle has no method named after a workload: attention, means"),
        ("broken.py:Taken", "there is a provider 'SDPA flash' already"),
        ("broken.py:Slipping", "' ours (torch)': a name that begins with \"ours\" is that of a provider of"),
        ("broken.py:Posing", "'Ours (mine)': a name that begins with \"ours\" is that of a provider of this package"),
        ("broken.py:Unmade", "cannot be loaded: OSError: no licence"),
        ("nobody", "none of ours (torch)"),
    ],
)
def test_a_provider_that_cannot_be_used_is_refused(folder, wish, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        chosen_providers(["SDPA flash", wish])


def test_all_and_parts_of_names(folder):
    assert len(chosen_providers(["all"])) == len(chosen_providers(None)) > 10
    assert [provider.name for provider in chosen_providers(["published"])] == ["published path"]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "needs the form"),
        ({"a": {"like": "nobody"}}, "a is like 'nobody', which is no case"),
        ({"a": {"like": "b"}, "b": {"like": "a"}}, "without an end"),
        ({"a": {"like": "toy", "head": 2}}, "case 'a': no field head; fields: batch"),
        ({"a": {"heads": 2}}, "case 'a': needs batch, head_dim"),
        ({"a": {"like": "toy", "heads": 2.5}}, "heads is 2.5; needed: a whole number from 1 on"),
        ({"a": {"like": "toy", "grid": [4]}}, "grid is [4]; needed: [rows, columns]"),
        ({"a": {"like": "toy", "sweep": "colour"}}, "sweep is 'colour'; needed: one of memory, window"),
        ({"a": {"like": "toy", "window": 1}}, "window is 1; needed: at least the chunk, 3"),
        ({"a": {"like": ["toy"]}}, "a is like ['toy'], which is no case"),
        ({"a": {"like": "toy", "sweep": ["memory"]}}, "sweep is ['memory']; needed: text"),
        ({"a": {"like": "toy", "about": 3}}, "about is 3; needed: text"),
        ({"a|b": {"like": "toy"}}, "name is 'a|b'; needed: text without a line break or |"),
        ({"a": {"like": "toy", "head_dim": 7}}, "head_dim is 7; needed: an even number"),
    ],
)
def test_a_wrong_case_is_named(tmp_path, entries, message):
    file = tmp_path / "cases.json"
    file.write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=re.escape(message)):
        read_cases(file, load_cases())


@pytest.mark.parametrize(
    ("text", "message"),
    [('{"a": {"like": "toy"}, "a": {}}', "a stands there twice"), ("[" * 100_000, "recursion"), ("{", "")],
)
def test_a_file_that_holds_no_cases_is_named(tmp_path, text, message):
    file = tmp_path / "cases.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=f"cases.json cannot be read as cases: .*{message}"):
        read_cases(file, load_cases())

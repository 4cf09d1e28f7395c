"""Small faults put into the code one at a time: which of them does no test see?

    python tests/tools/mutants.py                      all that mutated.py names
    python tests/tools/mutants.py policies --every 4   one file, every fourth mutant

A copy of the repository is changed, never the checkout itself. Prints a line per mutant and a table, and ends with 1 if
any survived. A survivor may be equivalent: mutated.py names those, with the reason.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mutated import EQUIVALENT, TESTS

ROOT = Path(__file__).parents[2]
SECONDS = 60.0  # and six times as long as without a fault: then a mutant does not end, which is seen as well

_COMPARED = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
_COMPUTED = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult}


class Mutant(NamedTuple):
    file: str
    line: int
    change: str  # "a < b -> a <= b"
    source: str  # of the whole file


def mutants(file: str) -> Iterator[Mutant]:
    """Every mutant of a file."""
    if not file.endswith(".py"):
        yield from _mutants_of_c(file)
        return
    tree = ast.parse((ROOT / file).read_text())
    for number, node in enumerate(ast.walk(tree)):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        for edit in _edits(node):
            changed = copy.deepcopy(tree)
            target = next(other for index, other in enumerate(ast.walk(changed)) if index == number)
            before = ast.unparse(target)
            edit(target)
            after = ast.unparse(target)
            if before != after:
                line = getattr(node, "lineno", 0)
                yield Mutant(file, line, f"{_short(before)} -> {_short(after)}", ast.unparse(changed))


_C = re.compile(  # an operator between spaces, a whole number, or the smaller and the larger of two
    r" (?P<op>==|!=|<=|>=|<|>|&&|\|\||\+|-|\*|/|%) |(?<![\w.])(?P<number>\d+)(?![\w.])|\b(?P<name>min|max)\("
)
_C_OPS = {"==": "!=", "!=": "==", "<": "<=", "<=": "<", ">": ">=", ">=": ">", "&&": "||", "||": "&&", "+": "-"}
_C_OPS |= {"-": "+", "*": "/", "/": "*", "%": "*"}


def _mutants_of_c(file: str) -> Iterator[Mutant]:
    """By text: what does not compile is seen, as by anyone who would write it."""
    lines = (ROOT / file).read_text().splitlines()
    for index, line in enumerate(lines):
        code = line.split("//")[0]
        if code.lstrip().startswith(("#", "*", "/*", "static_assert", "TORCH_CHECK")):
            continue
        for match in _C.finditer(code):
            if match["op"]:
                new = f" {_C_OPS[match['op']]} "
            elif match["number"]:
                new = str(int(match["number"]) + 1)
            else:
                new = {"min": "max(", "max": "min("}[match["name"]]
            changed = line[: match.start()] + new + line[match.end() :]
            source = "\n".join([*lines[:index], changed, *lines[index + 1 :]]) + "\n"
            begin, end = max(0, match.start() - 24), match.end() + 24
            told = f"{line[begin:end].strip()} -> {changed[begin : end + len(new) - len(match[0])].strip()}"
            yield Mutant(file, index + 1, told, source)


def _short(code: str) -> str:
    code = " ".join(code.split())
    return code if len(code) <= 60 else f"{code[:57]}..."


def _edits(node: ast.AST) -> list:
    """Functions that each put one fault into a node equal to `node`."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in _COMPARED:
        return [lambda n: n.ops.__setitem__(0, _COMPARED[type(n.ops[0])]())]
    if isinstance(node, ast.BinOp) and type(node.op) in _COMPUTED:
        return [lambda n: setattr(n, "op", _COMPUTED[type(n.op)]())]
    if isinstance(node, ast.BoolOp):
        return [lambda n: setattr(n, "op", ast.Or() if isinstance(n.op, ast.And) else ast.And())]
    if isinstance(node, ast.IfExp):
        return [lambda n: setattr(n, "test", ast.UnaryOp(ast.Not(), n.test))]
    if isinstance(node, ast.If):
        return [lambda n: setattr(n, "test", ast.UnaryOp(ast.Not(), n.test))]
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return [lambda n: setattr(n, "value", n.value + 1)]
    if isinstance(node, ast.Constant) and type(node.value) is bool:
        return [lambda n: setattr(n, "value", not n.value)]
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):  # a call for what it does is left out
        return [lambda n: setattr(n, "value", ast.Constant(None))]
    if isinstance(node, ast.Call) and any(word.arg in ("descending", "stable", "min", "max") for word in node.keywords):
        return [lambda n: n.keywords.pop()]
    if isinstance(node, ast.Attribute) and node.attr in ("argmin", "argmax"):
        return [lambda n: setattr(n, "attr", {"argmin": "argmax", "argmax": "argmin"}[n.attr])]
    return []


def equivalent(mutant: Mutant) -> str | None:
    """Why no test can see it, where that is known."""
    line = (ROOT / mutant.file).read_text().splitlines()[mutant.line - 1]
    for file, part, change, reason in EQUIVALENT:
        if file == mutant.file and part in line and change in mutant.change:
            return reason
    return None


def fate(mutant: Mutant, folder: Path, seconds: float) -> str:
    """Of a mutant: "killed", "endless" (the tests do not end in `seconds`), or "SURVIVED"."""
    path = folder / mutant.file
    good = path.read_text()
    path.write_text(mutant.source)
    try:
        return _run(TESTS[mutant.file], folder, seconds)
    finally:
        path.write_text(good)


def _import_libraries() -> None:
    """What the tests use of them, so that every copy of this process has it."""
    os.environ |= {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}  # read on import; threads do not survive a fork
    sys.dont_write_bytecode = True
    for module, names in (
        ("diffusers", ("AutoencoderKLWan", "WanTransformer3DModel", "UniPCMultistepScheduler")),
        ("transformers", ("UMT5EncoderModel", "AutoTokenizer", "T5TokenizerFast")),
        ("peft", ()),
        ("hypothesis", ()),
        ("torch._dynamo", ()),
    ):
        library = importlib.import_module(module)
        for name in names:
            getattr(library, name)


def _run(tests: list[str], folder: Path, seconds: float) -> str:
    """Run in a copy of this process: the libraries' imports take longer than most of the tests."""
    child = os.fork()
    if child == 0:
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        options = ["-q", "-x", "--tb=no", "-p", "no:cacheprovider", "-m", "not slow", "--rootdir", str(folder)]
        import pytest

        os._exit(int(pytest.main([*options, *tests])))
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return "killed" if status else "SURVIVED"
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "endless"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", help="parts of file names; all of the table where none is given")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="one mutant of N")
    parser.add_argument("--count", action="store_true", help="say how many there are, and run none")
    options = parser.parse_args()
    chosen = [file for file in TESTS if not options.files or any(part in file for part in options.files)]
    found = {file: list(mutants(file))[:: options.every] for file in chosen}
    if options.count:
        print("\n".join(f"{len(group):5}  {file}" for file, group in found.items()))
        return 0
    _import_libraries()
    words = {file: [] for file in chosen}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "repository"
        ignored = shutil.ignore_patterns(".git", ".venv", "*.egg-info", "__pycache__", "bench", "demo")
        shutil.copytree(ROOT, folder, ignore=ignored)
        for file, group in found.items():
            began = time.monotonic()
            if fate(Mutant(file, 0, "", (ROOT / file).read_text()), folder, 3600) != "SURVIVED":
                sys.exit(f"the tests of {file} fail as it is")
            seconds = SECONDS + 6 * (time.monotonic() - began)
            for mutant in group:
                word = fate(mutant, folder, seconds)
                if word == "SURVIVED" and (reason := equivalent(mutant)):
                    word = f"equivalent ({reason})"
                print(f"{word:9} {file}:{mutant.line}: {mutant.change}", flush=True)
                words[file].append(word.split(" (")[0])
    print(f"\n{'mutants':>8} {'seen':>7} {'equivalent':>11} {'SURVIVED':>9}  file")
    for file, ends in (*words.items(), ("all", [word for group in words.values() for word in group])):
        equal, lived = ends.count("equivalent"), ends.count("SURVIVED")
        print(f"{len(ends):8} {len(ends) - equal - lived:7} {equal:11} {lived:9}  {file}")
    return 1 if lived else 0


if __name__ == "__main__":
    sys.exit(main())

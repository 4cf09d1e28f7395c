"""The docstrings of everything public: every argument has a line of its own, and the examples run."""

import doctest
import inspect
import re

import pytest
import torch

import memflow_kernels

PUBLIC = {name: getattr(memflow_kernels, name) for name in memflow_kernels.__all__}


def parameters(function) -> list[str]:
    if inspect.isclass(function) and hasattr(function, "_fields"):
        return list(function._fields)
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_argument_has_a_line(name):
    text = inspect.getdoc(PUBLIC[name])
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", text, re.MULTILINE | re.DOTALL)
    described = re.findall(r"^    (\w+): \S", section[1], re.MULTILINE) if section else []
    assert described == parameters(PUBLIC[name])


@pytest.mark.parametrize("name", PUBLIC)
def test_what_it_gives_and_raises_is_said(name):
    text = inspect.getdoc(PUBLIC[name])
    function = PUBLIC[name]
    if not inspect.isclass(function) and parameters(function):
        assert re.search(r"^Raises:\n    \w", text, re.MULTILINE)
        gives = inspect.signature(function).return_annotation not in (None, "None")
        assert bool(re.search(r"^Returns:\n    \S", text, re.MULTILINE)) == gives
    assert max(len(line) for line in text.splitlines()) <= 120


@pytest.mark.parametrize("name", PUBLIC)
def test_the_example_runs(name):
    torch.manual_seed(0)
    globs = {name: PUBLIC[name]}
    finder = doctest.DocTestFinder(recurse=False)
    (example,) = finder.find(PUBLIC[name], name, globs=globs)
    assert example.examples, "there is none"
    said = []
    results = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example, out=said.append)
    assert not results.failed, "".join(said)

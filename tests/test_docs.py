"""The code of doc pages that promise to run does run, block after block in one namespace."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import memflow
import memflow_kernels

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


@pytest.mark.parametrize("page", ["from-attention.md", "python.md"])
def test_code_of_a_page(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_anchors(page):
    """Links to a heading lead to one that is there, as GitHub and MkDocs name it."""
    for target, anchor in re.findall(r"\]\(([^)#\s]*\.md)?#([^)]+)\)", page.read_text()):
        other = page.parent / target if target else page
        assert anchor in anchors(other.read_text()), f"{page.name} links to {target}#{anchor}"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built strictly: a link, an anchor or a name that is not there is an error. Without network."""
    if importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("mkdocstrings") is None:
        pytest.skip("mkdocs or mkdocstrings is not installed: pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    unreachable = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    command = [sys.executable, "-m", "mkdocs", "build", "-q", "--strict", "-d", str(folder)]
    environment = os.environ | unreachable | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def test_every_page_is_in_the_navigation(site):
    first = (site / "index.html").read_text()
    for page in DOCS.rglob("*.md"):
        address = page.relative_to(DOCS).with_suffix("").as_posix()
        assert f'href="{address}/"' in first, f"{page.name}: docs/hooks.py has the navigation"


@pytest.mark.parametrize("package", [memflow, memflow_kernels], ids=lambda package: package.__name__)
def test_every_public_name_is_in_the_reference(site, package):
    text = (site / "api" / package.__name__ / "index.html").read_text()
    missing = [name for name in package.__all__ if name[0] != "_" and f'id="{package.__name__}.{name}"' not in text]
    assert not missing


def test_the_site_fetches_nothing_from_elsewhere(site):
    for page in site.rglob("*.html"):
        tags = re.findall(r'<(?:script|img|link rel="stylesheet")[^>]*>', page.read_text())
        fetched = [tag for tag in tags if re.search(r'(?:src|href)="https?:', tag)]
        assert not fetched, f"{page.relative_to(site)}: {fetched}"


PACKAGE = Path(memflow.__file__).parent
EXAMPLES = [path for path in sorted(PACKAGE.rglob("*.py")) if re.search(r"^ +>>> ", path.read_text(), re.MULTILINE)]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_examples_in_docstrings(path, tmp_path, monkeypatch):
    """Those of memflow; those of memflow_kernels run in tests/kernels/test_docstrings.py."""
    monkeypatch.chdir(tmp_path)
    module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    assert not doctest.testmod(importlib.import_module(module)).failed


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}

"""What the package asks for and says of itself: requirements, addresses, versions, advice that works."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import memflow

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib, which reads pyproject.toml")
ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TEXTS = [
    path
    for pattern in (
        "*.md",
        "docs/**/*.md",
        "examples/**/*.md",
        "mkdocs.yml",
        "memflow*/**/*.py",
        "memflow/assets/**/*.md",
    )
    for path in ROOT.glob(pattern)
    if path.name not in ("CHANGELOG.md",)
]


def names(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w-]+", requirement)[0] for requirement in requirements}


def test_the_base_install_is_small():
    """torch for a CPU and what it needs; 1 GB of Triton comes only where it is asked for, or with a torch for GPUs."""
    assert names(PROJECT["dependencies"]) == {"torch", "numpy", "einops"}
    extras = PROJECT["optional-dependencies"]
    assert {extra for extra in extras if "triton" in names(extras[extra])} == {"triton", "test"}


def test_versions_agree():
    assert PROJECT["version"] == memflow.__version__


def test_tested_versions_are_allowed():
    """constraints.txt, what is installed for the tests, satisfies what pyproject.toml asks for."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    tested = dict(line.split("==") for line in lines if "==" in line)
    for extra in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()):
        for requirement in extra:
            name, least = re.match(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", requirement).groups()
            known = tested.get(name, tested.get(name.replace("-", "_")))
            if known:
                assert _numbers(known) >= _numbers(least), requirement


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_texts_name_no_address_and_no_index_of_their_own(path):
    """The project's address stands in pyproject.toml; its name is on no index, so that no command may rely on it."""
    text = path.read_text()
    ours = tuple(PROJECT["urls"].values())
    for address in re.findall(r"https?://[\w./-]*example\.org[\w./-]*", text):
        if "memflow" not in address:  # somebody else's: an example's host
            continue
        assert address.removesuffix(".git").rstrip("/.").startswith(ours), f"{address}: pyproject.toml has {ours}"
    if path.name != "errors.py":  # which has the command for an installation from an index, where it came from one
        assert not re.search(r"install\s+(-\S+\s+)*'?memflow-kernels\b", text)

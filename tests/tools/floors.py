"""The oldest diffusers, transformers and peft that the tests pass with: the floors in pyproject.toml.

    python tests/tools/floors.py             # search, then try the three floors together; about an hour
    python tests/tools/floors.py --together  # only the latter, with the floors that pyproject.toml has

Every trial is a new virtual environment that sees the packages of this one behind its own, so that torch is never
fetched. In it pip installs one old release (and what that release needs), PROBE runs (adapters, checkpoints, LoRAs,
streams), and a story is told whose latents must be those told here to TOLERANCE: bit for bit, as the recorded frames
of the tests, is too much to ask of other versions. Releases are halved, one for each minor version, as if what breaks
once stays broken; the floor passes and the release before it fails, both tried.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path

import tomllib
import torch

ROOT = Path(__file__).parents[2]
PACKAGES = ("diffusers", "transformers", "peft")
PROBE = (
    "tests/stream/test_streaming_attention.py",
    "tests/models/test_adapters.py",
    "tests/models/test_checkpoints.py",
    "tests/models/test_text.py",
    "tests/convert/test_lora.py",
)
# The tests' own `kernels`, which the extra `model` does not bring: older transformers import it where it is there, and
# know its older releases only.
HIDDEN = "import sys; sys.modules['kernels'] = None"
TOLERANCE = 1e-3  # relative, of all latents
STORY = """
import sys, torch
from memflow import MemFlowPipeline
prompts = ["bo, a red ball, jumps on the beach.", "mia, a blue star, waits in the forest.", "bo waits in the forest."]
chunks = list(MemFlowPipeline.from_preset("storybook").stream(prompts, seconds_per_prompt=1.5))
torch.save(torch.cat([chunk.latents for chunk in chunks], 2), sys.argv[1])
"""


def releases(package: str) -> list[str]:
    """The first release of every minor version, oldest first."""
    listed = _pip(sys.executable, "index", "versions", package).stdout
    versions = re.findall(r"\b\d+\.\d+\.\d+\b", listed.partition("Available versions:")[2].splitlines()[0])
    first: dict[tuple[int, ...], str] = {}
    for version in versions:  # newest first
        first[tuple(map(int, version.split(".")[:2]))] = version
    return [first[minor] for minor in sorted(first)]


def oldest(versions: list[str], passes: Callable[[str], bool]) -> str:
    """The oldest version that passes, if every newer one does; the newest is taken to pass."""
    fails, works = -1, len(versions) - 1
    while works - fails > 1:
        middle = (fails + works) // 2
        if passes(versions[middle]):
            works = middle
        else:
            fails = middle
    return versions[works]


def trial(*wanted: str) -> bool:
    """Whether the probe passes and the story is the same with these requirements (`peft==0.17.0`)."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        python = str(Path(folder, "bin", "python"))
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        behind = Path(folder, "lib", version, "site-packages", "behind.pth")
        behind.write_text(f"{sysconfig.get_path('purelib')}\n{HIDDEN}\n")
        fixed = [f"torch=={_version_of('torch')}"]
        installed = _pip(python, "install", "-q", *wanted, *fixed)
        if installed.returncode:
            return _said(wanted, "cannot be installed", installed.stderr)
        flags = ["-q", "-x", "-p", "no:cacheprovider", "-m", "not slow and not gpu"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        run = subprocess.run(
            [python, "-m", "pytest", *flags, *PROBE], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        if run.returncode:
            last = [line for line in run.stdout.splitlines() if line.startswith(("E  ", "FAILED", "ERROR"))][:1]
            return _said(wanted, "fails", "".join(last) or run.stderr[-300:])
        told = Path(folder, "told.pt")
        run = subprocess.run([python, "-c", STORY, str(told)], env=environment, capture_output=True, text=True)
        if run.returncode:
            return _said(wanted, "tells no story", run.stderr)
        difference = _difference(told)
        return _said(wanted, "" if difference <= TOLERANCE else "tells another story", f"differs by {difference:.1e}")


@functools.cache
def _told_here() -> torch.Tensor:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-c", STORY, f"{folder}/told.pt"], check=True, cwd=ROOT, capture_output=True)
        return torch.load(f"{folder}/told.pt")


def _difference(told: Path) -> float:
    expected = _told_here()
    return float((torch.load(told) - expected).norm() / expected.norm())


def floors() -> dict[str, str]:
    """What pyproject.toml asks for."""
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["model"]
    asked = dict(requirement.split(">=") for requirement in extra)
    return {package: asked[package] for package in PACKAGES}


def _version_of(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def _pip(python: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([python, "-m", "pip", *arguments], capture_output=True, text=True)


def _said(wanted: tuple[str, ...], wrong: str, why: str) -> bool:
    print(" ".join(wanted), f"{wrong or 'passes'}: {why.strip()[-300:]}", flush=True)
    return not wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--together", action="store_true", help="only try the floors of pyproject.toml together")
    parser.add_argument("packages", nargs="*", metavar="PACKAGE", help=f"[default: {', '.join(PACKAGES)}]")
    given = parser.parse_args()
    if given.together:
        sys.exit(not trial(*(f"{package}=={version}" for package, version in floors().items())))
    found = {}
    for package in given.packages or PACKAGES:
        found[package] = oldest(releases(package), lambda version, package=package: trial(f"{package}=={version}"))
        print(f"floor: {package}>={found[package]}", flush=True)
    trial(*(f"{package}=={version}" for package, version in found.items()))


if __name__ == "__main__":
    main()

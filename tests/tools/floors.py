"""The oldest diffusers, transformers and peft that the tests pass with: the floors in pyproject.toml.

    python tests/tools/floors.py             # search, then try the three floors together; about an hour
    python tests/tools/floors.py --together  # only the latter, with the floors that pyproject.toml has

Every trial is a new virtual environment that sees the packages of this one behind its own, so that torch is never
fetched. In it pip installs one old release (and what that release needs) and PROBE runs: recorded frames, adapters,
checkpoints, LoRAs. Releases are halved, one for each minor version, as if what breaks once stays broken; the floor
passes and the release before it fails, both tried.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path

import tomllib

ROOT = Path(__file__).parents[2]
PACKAGES = ("diffusers", "transformers", "peft")
PROBE = (
    "tests/stream/test_recorded_frames.py",
    "tests/stream/test_streaming_attention.py",
    "tests/models/test_adapters.py",
    "tests/models/test_checkpoints.py",
    "tests/models/test_text.py",
    "tests/convert/test_lora.py",
)


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
    """Whether the probe passes with these requirements (`peft==0.17.0`)."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        python = str(Path(folder, "bin", "python"))
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        behind = Path(folder, "lib", version, "site-packages", "behind.pth")
        behind.write_text(sysconfig.get_path("purelib") + "\n")
        fixed = [f"torch=={_version_of('torch')}"]
        installed = _pip(python, "install", "-q", *wanted, *fixed)
        if installed.returncode:
            return _said(wanted, "cannot be installed", installed.stderr)
        flags = ["-q", "-x", "-p", "no:cacheprovider", "-m", "not slow and not gpu"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        run = subprocess.run(
            [python, "-m", "pytest", *flags, *PROBE], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        last = [line for line in run.stdout.splitlines() if line.startswith(("E  ", "FAILED", "ERROR"))][:1]
        return _said(wanted, "" if run.returncode == 0 else "fails", "".join(last) or run.stderr[-300:])


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
    print(" ".join(wanted), f"{wrong}: {why.strip()[-300:]}" if wrong else "passes", flush=True)
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

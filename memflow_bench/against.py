"""Two builds of the kernels in alternation: this tree, and any commit. One process each, one sample each in turns."""

from __future__ import annotations

import io
import json
import statistics
import subprocess
import sys
import tarfile
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch

from .environment import ROOT
from .runner import Experiment
from .timing import spread

PACKAGES = ("memflow", "memflow_kernels")
ROUNDS = 15


class Build:
    """A worker process that runs one experiment on the packages of one tree, with this harness."""

    def __init__(self, packages: Path, folder: Path):
        folder.mkdir()
        for name in PACKAGES:
            (folder / name).symlink_to(packages / name)
        (folder / "benchmarks").symlink_to(ROOT / "benchmarks")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker"],
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, question: dict) -> dict:
        """Raises RuntimeError where the worker has died or could not do it."""
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline() or '{"error": "the worker has died"}')
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def compare(revision: str, experiments: list, device: torch.device, output: Path | None) -> int:
    """Print, and write to `output`, how many times faster this tree is than `revision`, round by round."""
    lines = [f"| what | {revision} | this tree | times faster (median of pairs) |", "|---|---|---|---|"]
    results = []
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        tree = scratch / "tree"
        _unpack(revision, tree)
        builds = Build(tree, scratch / "before"), Build(ROOT, scratch / "after")
        for build in builds:
            stack.callback(build.close)
        for experiment in experiments:
            if not isinstance(experiment, Experiment):
                continue
            for activated in experiment.modes:
                title = f"{experiment.title}, {'activated' if activated else 'dense'}"
                print(title, flush=True)
                try:
                    before, after = _alternate(builds, experiment, activated, device)
                except RuntimeError as error:
                    lines.append(f"| {title} | | | failed: {error} |")
                    continue
                results.append({"title": title, "before": before, "after": after})
                faster = statistics.median(b / a for a, b in zip(after, before, strict=True))
                medians = (f"{spread(times)['median'] * 1e3:.3g} ms" for times in (before, after))
                lines.append(f"| {title} | {' | '.join(medians)} | {faster:.3f} |")
    print("\n".join(["", *lines]))
    if output:
        output.write_text(json.dumps({"against": revision, "results": results}, indent=1) + "\n")
    return 0


def _alternate(builds, experiment: Experiment, activated: bool, device: torch.device) -> tuple[list, list]:
    wish = {"workload": experiment.workload, "case": asdict(experiment.case), "dtype": experiment.dtype}
    for build in builds:
        build.ask({"prepare": wish | {"activated": activated, "device": device.type}})
    rounds = [[build.ask({"sample": True})["seconds"] for build in builds] for _ in range(ROUNDS)]
    return [pair[0] for pair in rounds], [pair[1] for pair in rounds]


def _unpack(revision: str, folder: Path) -> None:
    """The packages as they were at `revision`."""
    done = subprocess.run(["git", "-C", str(ROOT), "archive", revision, "--", *PACKAGES], capture_output=True)
    if done.returncode:
        raise ValueError(f"--against {revision}: {done.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")

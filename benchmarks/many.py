"""Many stories over workers against one worker: python -m benchmarks.many -o benchmarks/results/cpu-many.md

The whole command is timed, loading of the models included, in the order 1, N, N, 1; and, from what it prints, the
frames of all films. With --ray the same over actors of a cluster that the command starts.

python -m benchmarks.many --costs memflow-1.3b: nothing is run, and what up to 1,000 workers ask of the storage that
they share is computed, from the sizes of the model's memory.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

PROMPTS = ["bo, a red ball, jumps on the beach.", "mia, a white star, waits in the forest."]


class Run(NamedTuple):
    """seconds: of the whole command. frames: of all films."""

    seconds: float
    frames: int


def run(stories: Path, options: list[str]) -> Run:
    """Tell the stories with `memflow generate` and these options, into a folder that is thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "memflow", "generate", str(stories), "-o", folder, *options]
        begin = time.monotonic()
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
        seconds = time.monotonic() - begin
    return Run(seconds, int(re.search(r"^all +(\d+) frames", done.stdout, re.MULTILINE)[1]))


def table(kinds: dict[str, list[str]], runs: dict[str, list[Run]], stories: int, seconds: float) -> str:
    """Markdown: every kind of run, fastest and slowest, against the first kind."""
    first = min(found.seconds for found in next(iter(runs.values())))
    lines = [
        "# Many stories over workers",
        "",
        f"{stories} stories of {len(PROMPTS)} prompts, {seconds:g} s each, the embedded model at its own size, "
        f"{len(os.sched_getaffinity(0))} CPU cores ({platform.machine()}), Python {platform.python_version()}; "
        f"load average {os.getloadavg()[0]:.1f} at the end. Time is that of the whole command, models loaded anew.",
        "",
        "| options | seconds, fastest - slowest | frames/s | against the first |",
        "|---|---|---|---|",
    ]
    for name, found in runs.items():
        least, most = min(one.seconds for one in found), max(one.seconds for one in found)
        options = " ".join(kinds[name])
        rate = found[0].frames / least
        lines.append(f"| `{options}` | {least:.1f} - {most:.1f} | {rate:.1f} | {first / least:.2f} x |")
    return "\n".join(lines) + "\n"


RATE, PER_SECOND = 18.7, 16  # frames/s made by one H100 (published, arXiv 2512.14699), and shown
FILM = 1e6  # bytes per second of video, 8 Mbit/s
DIGEST = 1.2e9  # bytes per second of SHA-256, one core
LINK = 3e9  # bytes per second that one machine writes, at most
SHARE, PAUSE = 0.05, 30.0  # as memflow/cli/worker.py: of the time for states, and seconds between them at least


def costs(model: str) -> str:
    """Markdown: what N workers ask of a shared folder, for storages of 2, 20 and 200 GB/s."""
    from memflow.cli.doctor import describe
    from memflow.models.wan.footprint import footprint

    found = footprint(describe(model))
    state, weights = found.pool + found.vae_cache, found.transformer + found.vae
    lines = [
        f"{model}: a state has {state / 1e9:.1f} GB, the weights {weights / 1e9:.1f} GB (with the text encoder "
        f"{(weights + found.text_encoder) / 1e9:.1f} GB), a film {RATE / PER_SECOND * FILM / 1e6:.1f} MB per second.",
        "",
        "| workers | weights read at the start, GB | films, MB/s | states, GB/s; seconds between two, at 2 GB/s | "
        "at 20 GB/s | at 200 GB/s |",
        "|---|---|---|---|---|---|",
    ]
    for workers in (1, 8, 64, 256, 1000):
        cells = [f"{workers * weights / 1e9:,.0f}", f"{workers * RATE / PER_SECOND * FILM / 1e6:,.0f}"]
        for storage in (2e9, 20e9, 200e9):
            # They do not write all at once: each is told to spend SHARE of its time on it.
            each = min(LINK, storage / max(1.0, workers * SHARE))
            cost = state / DIGEST + state / each
            between = max(PAUSE, cost / SHARE) + cost
            cells.append(f"{workers * state / between / 1e9:.2f}; {between:,.0f}")
        lines.append(f"| {workers:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, help="a file for the table, besides stdout")
    parser.add_argument("--jobs", type=int, default=2, help="workers compared with one (default: 2)")
    parser.add_argument("--stories", type=int, default=12, help="how many (default: 12)")
    parser.add_argument("--seconds", type=float, default=6.0, help="of video for each prompt (default: 6)")
    parser.add_argument("--ray", action="store_true", help="the same with Ray too")
    parser.add_argument("--costs", metavar="MODEL", help="compute what the storage of many workers must carry")
    given = parser.parse_args()
    if given.costs:
        print(costs(given.costs))
        return
    kinds = {"one": ["--jobs", "1"], "many": ["--jobs", str(given.jobs)]}
    if given.ray:
        kinds |= {"one, ray": ["--jobs", "1", "--ray"], "many, ray": ["--jobs", str(given.jobs), "--ray"]}
    runs: dict[str, list[Run]] = {name: [] for name in kinds}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tales.jsonl"
        story = {"prompts": PROMPTS, "seconds_per_prompt": given.seconds}
        path.write_text("".join(json.dumps(story | {"seed": seed}) + "\n" for seed in range(given.stories)))
        for name in [*kinds, *reversed(kinds)]:
            runs[name].append(run(path, kinds[name]))
            print(f"{name}: {runs[name][-1].seconds:.1f} s", file=sys.stderr)
    text = table(kinds, runs, given.stories, given.seconds)
    print(text)
    if given.output is not None:
        given.output.write_text(text)


if __name__ == "__main__":
    main()

"""Many stories over workers against one worker: python -m benchmarks.many -o benchmarks/results/cpu-many.md

The whole command is timed, loading of the models included, in the order 1, N, N, 1; and, from what it prints, the
frames of all films. With --ray the same over actors of a cluster that the command starts.
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, help="a file for the table, besides stdout")
    parser.add_argument("--jobs", type=int, default=2, help="workers compared with one (default: 2)")
    parser.add_argument("--stories", type=int, default=12, help="how many (default: 12)")
    parser.add_argument("--seconds", type=float, default=6.0, help="of video for each prompt (default: 6)")
    parser.add_argument("--ray", action="store_true", help="the same with Ray too")
    given = parser.parse_args()
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

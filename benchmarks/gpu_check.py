"""Everything that only a GPU can show about the kernels, in one command: `make gpu-check`.

The build of the CUDA kernels, the kernel tests natively on every backend, compute-sanitizer's memcheck and racecheck on
small cases, and the speed table beside the peers. Needs torch, triton, numpy, pytest, hypothesis and einops; without
nvcc and ninja the CUDA kernels are left out, and the reason is printed. Writes benchmarks/results/<gpu>.json after
every step, so that what was found survives an interruption; exit code 0 only where every step ran and passed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from memflow_kernels.cuda import extension
from memflow_kernels.cuda.builder.toolchain import ARCHITECTURES_VARIABLE, DEFAULT, parse

ROOT = Path(__file__).resolve().parents[1]
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
# Small cases of every kernel, forward and backward; sanitizers slow a kernel down a hundredfold.
SMALL = (
    "((triton or cuda) and "
    "(odd_sizes or any_layout or gradient_equals or larger_sizes or test_cases or low_precision or served)) "
    "or pieces or head_sizes or gathered"
)
STEPS = ("build", "tests", "memcheck", "racecheck", "speed")


def environment() -> dict[str, str]:
    """Variables of every subprocess: the repository's packages first, no interpreter."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "TRITON_INTERPRET": "0"}


def run(command: list[str], **variables: str) -> dict[str, object]:
    """passed, seconds and the last lines of what a command said; it also appears as it comes."""
    print("$", " ".join(command), flush=True)
    begin = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment() | variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line.rstrip())
    seconds = round(time.perf_counter() - begin, 1)
    return {"passed": process.wait() == 0, "seconds": seconds, "said": lines[-3:]}


def architecture(capability: tuple[int, int]) -> str:
    """The entry of the default list that was made for this GPU, or a plain one where none serves it."""
    serving = [str(entry) for entry in parse(DEFAULT) if entry.serves(capability)]
    return serving[-1] if serving else "{}.{}".format(*capability)


def build() -> dict[str, object]:
    """Build the CUDA kernels as their first use would, and load them. passed None: there is no compiler here."""
    reason = extension.missing()
    if reason is not None:
        print("the CUDA kernels are left out:", reason)
        return {"passed": None, "seconds": 0, "said": [f"did not run: {reason}"]}
    begin = time.perf_counter()
    reason = extension.unloadable()
    seconds = round(time.perf_counter() - begin, 1)
    said = reason or f"{extension.described()}, for {torch.ops.memflow_cuda.architectures()}"
    return {"passed": reason is None, "seconds": seconds, "said": [said]}


def ours() -> dict[str, str]:
    """The rows of the speed table: what a user gets, and the CUDA kernels where there are any."""
    there = extension.missing() is None and extension.unloadable() is None
    return {"ours": "triton"} | ({"ours (cuda)": "cuda"} if there else {})


def tests() -> dict[str, object]:
    return run([*PYTEST, "-m", "not slow", "--ignore=tests/kernels/test_aot.py", "tests/kernels"])


def sanitizer(tool: str) -> dict[str, object]:
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(program).exists():
        return {"passed": False, "seconds": 0, "said": ["compute-sanitizer is not installed: this step did not run"]}
    command = [program, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
    # without torch's cache every tensor is an allocation of its own, whose ends are seen
    return run([*command, *PYTEST, "-k", SMALL, "tests/kernels"], PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def speed() -> dict[str, object]:
    from benchmarks import gpu_speed

    begin = time.perf_counter()
    rows, ceilings, wrong = gpu_speed.measure(torch.device("cuda"), gpu_speed.MODEL, ours())
    print(gpu_speed.table(rows))
    met = gpu_speed.targets(rows, ceilings)
    for target, reached in met.items():
        print(f"{'reached' if reached else 'MISSED '}  {target}")
    return {
        "passed": not wrong and all(met.values()),
        "seconds": round(time.perf_counter() - begin, 1),
        "said": wrong,
        "targets": met,
        "ceilings": ceilings,
        "rows": rows,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"only these of {', '.join(STEPS)}")
    parser.add_argument("-o", "--output", type=Path, help="default: benchmarks/results/<gpu>.json")
    options = parser.parse_args(arguments)
    unknown = [step for step in options.steps if step not in STEPS]
    if unknown:
        parser.error(f"unknown step {unknown[0]!r}; there are {', '.join(STEPS)}")
    if not torch.cuda.is_available():
        print("gpu-check: torch sees no GPU here, and nothing of this can be shown without one", file=sys.stderr)
        return 1
    name = torch.cuda.get_device_name()
    output = options.output or ROOT / "benchmarks" / "results" / f"{re.sub('[^a-z0-9]+', '-', name.lower())}.json"
    found = json.loads(output.read_text()) if output.exists() else {}
    import triton

    found |= {"gpu": name, "torch": torch.__version__, "triton": triton.__version__}
    os.environ.setdefault(ARCHITECTURES_VARIABLE, architecture(torch.cuda.get_device_capability()))
    actions = {"build": build, "tests": tests, "speed": speed}
    for step in options.steps or STEPS:
        found[step] = actions[step]() if step in actions else sanitizer(step)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(found, indent=1) + "\n")
    print()
    passed = []
    for step in STEPS:
        result = found.get(step, {"passed": False, "said": ["not asked for"]})
        left_out = step == "build" and result["passed"] is None
        passed.append(result["passed"] or left_out)
        state = "passed" if result["passed"] else "FAILED" if step in found and not left_out else "not run"
        print(f"{step:10} {state}{': ' + result['said'][-1] if left_out else ''}")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    raise SystemExit(main())

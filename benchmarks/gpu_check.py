"""Everything that only a GPU can show about the kernels: `make gpu-check`, or one step, `make gpu-check STEP=speed`.

Steps, the most valuable first; each ends within LIMIT seconds: `build` (CUDA library; every Triton kernel of the model,
in parallel, into Triton's cache), `correct` (results at the published size, element by element), `speed` (the table
beside the peers), `tests` (the kernel tests natively), `memcheck` and `racecheck` (compute-sanitizer on small cases).

Needs torch, triton, numpy, pytest, hypothesis and einops; without nvcc and ninja the CUDA kernels are left out, and the
reason is printed. Each step is a process of its own, so that one that crashes or hangs takes no other with it, and
writes what it finds to benchmarks/results/<gpu>.json as it finds it. Exit code 0 only where every step ran and passed.

`--rehearse` goes through every step on a machine without a GPU: tiny sizes, Triton's interpreter, meaningless times.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.sanitizers import sifted
from memflow_kernels.cuda import extension
from memflow_kernels.cuda.builder import CACHE_VARIABLE, cache_folder
from memflow_kernels.cuda.builder.toolchain import ARCHITECTURES_VARIABLE, DEFAULT, parse

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 480  # seconds of a step
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
# Cases of every kernel, forward and backward, that need at most 150 specialisations of Triton's kernels
# (tests/kernels/launches.py counts them).
SMALL = (
    "((triton or cuda) and "
    "(odd_sizes or any_layout or gradient_equals or larger_sizes or test_cases or low_precision or served)) "
    "or pieces or head_sizes or gathered"
)
NATIVE = f"({SMALL}) or test_gpu or (gluon_attention and gpu)"
WITHOUT_A_GPU = [f"--ignore=tests/kernels/{name}.py" for name in ("test_aot", "test_byte_code", "test_cuda_compile")]
AHEAD_OF_TIME = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")  # the chips that tests/kernels/aot.py knows
Found = dict[str, object]
Report = Callable[[Found], None]


class Machine:
    """What is checked: the GPU, or with rehearse this machine's CPU in its place."""

    def __init__(self, rehearse: bool) -> None:
        self.rehearse = rehearse
        self.name = "rehearsal" if rehearse else torch.cuda.get_device_name()
        self.capability = (9, 0) if rehearse else torch.cuda.get_device_capability()
        self.device = torch.device("cpu" if rehearse else "cuda")

    def size(self):
        from benchmarks import gpu_calls

        return gpu_calls.TINY if self.rehearse else gpu_calls.MODEL

    def ours(self) -> dict[str, str]:
        """The rows of the tables: what a user gets, and the CUDA kernels where there are any."""
        there = not self.rehearse and extension.missing() is None and extension.unloadable() is None
        return {"ours": "triton"} | ({"ours (cuda)": "cuda"} if there else {})


def environment(rehearse: bool) -> dict[str, str]:
    """Variables of every subprocess: this repository first, one cache of built libraries, no interpreter on a GPU."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    fixed = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "TRITON_INTERPRET": str(int(rehearse))}
    return {**os.environ, CACHE_VARIABLE: str(cache_folder()), **fixed}


def run(command: list[str], rehearse: bool, seconds: float, **variables: str) -> tuple[int | None, list[str]]:
    """The exit code, None where it took longer than `seconds`, and what a command said; it also appears as it comes."""
    print("$", " ".join(map(str, command)), flush=True)
    process = subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        env=environment(rehearse) | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    lines: list[str] = []

    def read() -> None:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip())

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(process.pid, 9)
            process.wait()
        reading.result()
    return code, lines


def architecture(capability: tuple[int, int]) -> str:
    """The entry of the default list that was made for this GPU, or a plain one where none serves it."""
    serving = [str(entry) for entry in parse(DEFAULT) if entry.serves(capability)]
    return serving[-1] if serving else "{}.{}".format(*capability)


def build(machine: Machine, report: Report) -> Found:
    """The CUDA library, as its first use would build it; every Triton kernel of the model, in parallel processes."""
    found: Found = {"cuda": "left out"}
    reason = extension.missing()
    if reason is None and not machine.rehearse:
        reason = extension.unloadable()
        if reason is not None:
            return {"passed": False, "said": [reason]}
        found["cuda"] = f"{extension.described()}, for {torch.ops.memflow_cuda.architectures()}"
        report(found)
    else:
        found["cuda"] = f"left out: {reason or 'a rehearsal'}"
    patterns = ["attention bf16 D=128", "gathered*", "qk_norm_rope bf16", "relevance bf16", "*_fr*s bf16", "re*e bf16"]
    chip = f"sm_{machine.capability[0]}{machine.capability[1]}"
    script = ROOT / "tests" / "kernels" / "aot.py"
    if machine.rehearse:
        patterns = ["replace_frame bf16"]
    if chip not in AHEAD_OF_TIME:
        return found | {"passed": True, "said": [found["cuda"], f"nothing compiled ahead of time for {chip}"]}
    begin = time.perf_counter()
    with ThreadPoolExecutor(min(len(patterns), os.cpu_count() or 1)) as pool:
        commands = [[sys.executable, "-W", "ignore", script, chip, "--cases", pattern] for pattern in patterns]
        done = list(pool.map(lambda command: run(command, False, LIMIT - 60), commands))
    failed = [lines[-1] if lines else "no output" for code, lines in done if code != 0]
    compiled = f"Triton kernels of {len(patterns)} cases in {time.perf_counter() - begin:.0f} s"
    return found | {"passed": not failed, "said": [found["cuda"], *(failed or [compiled])]}


def correct(machine: Machine, report: Report) -> Found:
    from benchmarks import gpu_correct

    findings, begin = [], time.perf_counter()

    def note(finding: gpu_correct.Finding) -> None:
        state = "right" if finding.right else "WRONG"
        print(f"{state} {finding.worst:8.3f} of what is allowed  {finding.what}  {finding.where}", flush=True)
        findings.append(finding._asdict() | {"right": finding.right})
        report({"findings": findings})

    right = gpu_correct.check(machine.size(), machine.device, machine.ours(), note)
    wrong = [f"{finding['what']}: {finding['where']}" for finding in findings if not finding["right"]]
    said = wrong or [f"{len(findings)} comparisons in {time.perf_counter() - begin:.0f} s, all within what is allowed"]
    return {"passed": right, "said": said, "findings": findings}


def speed(machine: Machine, report: Report) -> Found:
    from benchmarks import gpu_speed

    budget = 0.01 if machine.rehearse else 4.0
    found = gpu_speed.measure(machine.device, machine.size(), machine.ours(), budget, LIMIT / 2, report)
    print(gpu_speed.table(found["rows"]))
    met = gpu_speed.targets(found["rows"], found["ceilings"])
    for target, reached in met.items():
        print(f"{'reached' if reached else 'MISSED '}  {target}")
    missed = [f"missed: {target}" for target, reached in met.items() if not reached]
    return found | {"passed": not found["wrong"] and not missed, "said": found["wrong"] + missed, "targets": met}


def tests(machine: Machine, report: Report) -> Found:
    chosen = "replacement and any_layout and triton" if machine.rehearse else NATIVE
    command = [*PYTEST, "-m", "not slow", *WITHOUT_A_GPU, "-k", chosen]
    if importlib.util.find_spec("xdist"):  # kernels are compiled side by side
        command += ["-n", str(min(os.cpu_count() or 1, 8))]
    code, lines = run([*command, "tests/kernels"], machine.rehearse, LIMIT)
    return {"passed": code == 0, "said": lines[-3:] if code is not None else [f"stopped after {LIMIT} s", *lines[-3:]]}


def sanitizer(tool: str, machine: Machine, report: Report) -> Found:
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if machine.rehearse or not Path(program).exists():
        reason = "it needs a GPU" if machine.rehearse else "compute-sanitizer is not installed"
        return {"passed": False, "said": [f"{reason}: this step did not run"]}
    command = [program, "--tool", tool, "--target-processes", "all", *PYTEST, *WITHOUT_A_GPU, "-k", SMALL]
    # without torch's cache every tensor is an allocation of its own, whose ends are seen
    code, lines = run([*command, "tests/kernels"], False, LIMIT - 10, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    standing, explained = sifted(tool, lines)
    said = [f"{number} known false alarms in {name}" for name, number in explained.items()]
    said += standing[:5] if standing else [line for line in lines[-3:] if code != 0]
    if code is None:
        said.append(f"stopped after {LIMIT - 10} s; {len(standing)} reports until then")
    return {"passed": code == 0 and not standing, "said": said, "reports": standing}


ACTIONS: dict[str, Callable[[Machine, Report], Found]] = {
    "build": build,
    "correct": correct,
    "speed": speed,
    "tests": tests,
    "memcheck": lambda machine, report: sanitizer("memcheck", machine, report),
    "racecheck": lambda machine, report: sanitizer("racecheck", machine, report),
}
STEPS = tuple(ACTIONS)


def update(output: Path, step: str, found: Found) -> None:
    """Put what a step found so far into the file of results, beside what the others found."""
    results = json.loads(output.read_text()) if output.exists() else {}
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_suffix(".partial")
    partial.write_text(json.dumps(results | {step: found}, indent=1) + "\n")
    partial.replace(output)


def one_step(step: str, machine: Machine, output: Path) -> None:
    """Run a step here. What it found stays in `output` also where it ends by an exception, or is stopped."""
    begin = time.perf_counter()
    seconds = lambda: round(time.perf_counter() - begin, 1)  # noqa: E731
    latest: Found = {}

    def report(found: Found) -> None:
        latest.update(found)
        update(output, step, {"passed": False, "seconds": seconds(), "said": ["did not end"]} | latest)

    report({})
    try:
        found = ACTIONS[step](machine, report)
    except Exception as error:
        found = {**latest, "passed": False, "said": [f"{type(error).__name__}: {error}".splitlines()[0][:500]]}
        print(f"{step}: {found['said'][0]}", file=sys.stderr)
    update(output, step, found | {"seconds": seconds()})


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"only these of {', '.join(STEPS)}")
    parser.add_argument("-o", "--output", type=Path, help="default: benchmarks/results/<gpu>.json")
    parser.add_argument("--rehearse", action="store_true", help="go through the steps without a GPU")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # in this process: how a step is begun
    options = parser.parse_args(arguments)
    unknown = [step for step in options.steps if step not in STEPS]
    if unknown:
        parser.error(f"unknown step {unknown[0]!r}; there are {', '.join(STEPS)}")
    if options.rehearse and options.output is None:
        parser.error("a rehearsal is no result: name a file for it with --output")
    if not options.rehearse and not torch.cuda.is_available():
        print("gpu-check: torch sees no GPU here, and nothing of this can be shown without one", file=sys.stderr)
        return 1
    machine = Machine(options.rehearse)
    slug = re.sub("[^a-z0-9]+", "-", machine.name.lower())
    output = options.output or ROOT / "benchmarks" / "results" / f"{slug}.json"
    os.environ.setdefault(ARCHITECTURES_VARIABLE, architecture(machine.capability))
    if options.here:
        one_step(options.steps[0], machine, output)
        return 0
    import triton

    for name, value in {"gpu": machine.name, "torch": torch.__version__, "triton": triton.__version__}.items():
        update(output, name, value)
    for step in options.steps or STEPS:
        flags = ["--here", *(["--rehearse"] if options.rehearse else []), "-o", str(output.resolve())]
        code, lines = run([sys.executable, "-m", "benchmarks.gpu_check", step, *flags], options.rehearse, LIMIT)
        if code != 0:
            found = json.loads(output.read_text()).get(step, {})
            end = f"stopped after {LIMIT} s" if code is None else f"ended with code {code}"
            update(output, step, found | {"passed": False, "said": [end, *lines[-2:]]})
    return summary(json.loads(output.read_text()))


def summary(found: dict[str, Found]) -> int:
    """Print the state of every step; 0 where all of them passed."""
    print()
    for step in STEPS:
        result = found.get(step, {"passed": False, "seconds": 0, "said": ["not asked for"]})
        state = "passed" if result["passed"] else "FAILED" if step in found else "not run"
        print(f"{step:10} {state} {result.get('seconds', 0):6.1f} s  {'; '.join(map(str, result['said']))}")
    return 0 if all(found.get(step, {}).get("passed") for step in STEPS) else 1


if __name__ == "__main__":
    raise SystemExit(main())

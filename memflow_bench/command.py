"""The command line of the harness."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch

from memflow_kernels import available_backends

from . import environment, load
from .cases import Case, load_cases, read_cases
from .ceilings import ceilings, highest
from .definitions import export
from .experiments import DTYPES, AnyExperiment, Experiment, StreamExperiment, workload_of
from .providers.choice import OURS, chosen_providers
from .report import write_report
from .rows import Result, Row, write
from .runner import run_experiment
from .suites import SUITES, own, suite
from .table import environment_lines, markdown
from .workloads import WORKLOADS


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        return options.action(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        print("stopped", flush=True)  # what was being done is in the line above
        return 130


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog=environment.program(), description="Correct first, then timed, beside every peer."
    )
    actions = top.add_subparsers(required=True, metavar="ACTION")

    run = actions.add_parser("run", help="measure a suite, or cases of your own")
    run.add_argument("--suite", choices=SUITES, default="quick")
    run.add_argument("--cases", type=Path, metavar="FILE.json", help="cases of your own, in place of the suite's")
    run.add_argument("--workloads", nargs="+", metavar="NAME", help="only these")
    run.add_argument(
        "--providers", nargs="+", metavar="NAME", help="only these: parts of names, FILE.py:Name for your own, or all"
    )
    run.add_argument("--dtypes", nargs="+", choices=DTYPES, help="only these")
    run.add_argument(
        "--against",
        metavar="WHAT",
        help="a verdict in place of tables: this build, or the one provider named, against a commit, a folder that "
        "holds memflow_kernels, or FILE.py:Name",
    )
    run.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    run.add_argument("--threads", type=_count, help="CPU threads; default: one per core")
    run.add_argument("--warm", action="store_true", help="leave the caches as the last sample left them")
    run.add_argument("-o", "--output", type=Path, help="result file (JSON)")
    run.set_defaults(action=run_suite)

    report = actions.add_parser("report", help="tables and plots of result files")
    report.add_argument("files", nargs="+", type=Path, metavar="FILE")
    report.add_argument("-o", "--output", type=Path, help="folder; default: beside the first file")
    report.set_defaults(action=lambda options: write_report(options.files, options.output))

    cases = actions.add_parser("cases", help="list the cases, or export them as FlashInfer-Bench definitions")
    cases.add_argument("--cases", type=Path, metavar="FILE.json", help="cases of your own")
    cases.add_argument("--export-definitions", type=Path, metavar="FOLDER", help="write one JSON file per case")
    cases.set_defaults(action=show_cases)

    test = actions.add_parser("selftest", help="is --against right on this machine? a build against itself, and slowed")
    test.add_argument(
        "--comparisons", type=_count, default=20, help="default: 20, some seven minutes on a quiet machine"
    )
    test.add_argument("--threads", type=_count, default=1, help="default: 1, which ends in time on a busy machine too")
    test.set_defaults(action=run_selftest)
    return top


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def run_suite(options: argparse.Namespace) -> int:
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here")
    if options.threads:
        torch.set_num_threads(options.threads)
    experiments = selected(options, device)
    if options.output:
        if options.output.is_dir():
            raise ValueError(f"--output {options.output} is a folder; needed: a file")
        options.output.parent.mkdir(parents=True, exist_ok=True)  # before minutes of measuring, not after
    if options.against is not None:
        return run_against(options, experiments, device)
    providers = chosen_providers(options.providers)
    facts = facts_of(device)
    dtypes = dict.fromkeys(experiment.dtype for experiment in experiments)
    limits = {dtype: ceilings(device, DTYPES[dtype]) for dtype in dtypes}
    if options.providers:
        whole = [e.title for e in experiments if not isinstance(e, Experiment) and not options.workloads]
        if whole:
            say(f"left out, as providers take no part in them: {', '.join(whole)}; --workloads stream measures them")
        experiments = [experiment for experiment in experiments if experiment.title not in whole]
    cases = {experiment.case.name: experiment.case for experiment in experiments}
    rows: list[Row] = []

    def keep() -> None:
        if options.output:
            write(options.output, Result(facts, limits, rows, cases))  # what is measured survives an interruption

    begin = time.perf_counter()
    for number, experiment in enumerate(experiments, 1):
        print(f"[{number}/{len(experiments)}, {time.perf_counter() - begin:.0f} s] {experiment.title}", flush=True)
        if isinstance(experiment, Experiment):
            how = {"wished": bool(options.providers), "cold": not options.warm, "graphs": True}
            rows += run_experiment(experiment, providers, device, **how, say=say)
        else:
            rows += run_whole(experiment, device)
        keep()
    facts["seconds"] = round(time.perf_counter() - begin, 1)
    facts["load_average_after"] = environment.load_average()
    limits = highest(limits, {dtype: ceilings(device, DTYPES[dtype]) for dtype in dtypes})
    idle = [p.name for p in providers if options.providers and all(row.provider != p.name for row in rows)]
    facts["took_part_in_nothing"] = idle
    keep()
    print()
    print(markdown(facts, limits, rows))
    judged = [row for row in rows if options.providers or row.provider.startswith("ours")]  # peers may fail as they do
    return int(any(row.status in ("wrong", "failed") for row in judged))


def run_whole(experiment: AnyExperiment, device: torch.device) -> list[Row]:
    """A stream or a loop; a row that says what is missing where the model's packages are not installed."""
    run: Callable[..., list[Row]]
    try:
        if isinstance(experiment, StreamExperiment):
            from .streams import run_stream as run
        else:
            from .realtime import run_realtime as run
    except ModuleNotFoundError as error:
        where = workload_of(experiment), experiment.case.name, False, experiment.dtype, device.type
        reason = f"the module {error.name} is not installed"
        say(f"  missing {reason}")
        return [Row(*where, "whole streams", experiment.title, "missing", reason)]
    return run(experiment, device, say)


def run_against(options: argparse.Namespace, experiments: list[AnyExperiment], device: torch.device) -> int:
    from .against import compare

    named = options.providers or [OURS]
    if len(named) > 1:
        raise ValueError(f"--against compares two: name one of --providers {' '.join(named)}")
    header = environment_lines(facts_of(device), {})
    return compare(
        options.against, named[0], experiments, device, cold=not options.warm, output=options.output, header=header
    )


def run_selftest(options: argparse.Namespace) -> int:
    from .selftest import selftest

    torch.set_num_threads(options.threads)
    return selftest(options.comparisons, environment_lines(facts_of(torch.device("cpu")), {}))


def facts_of(device: torch.device) -> dict:
    facts = environment.record(device)
    if warning := load.warning(facts["other_work"]):
        print(warning, flush=True)
    return facts


def selected(options: argparse.Namespace, device: torch.device) -> list[AnyExperiment]:
    if options.cases:
        unknown = sorted(set(options.workloads or ()) - set(WORKLOADS))
        if unknown:
            raise ValueError(f"--workloads: {', '.join(unknown)} unknown; workloads: {', '.join(WORKLOADS)}")
        return own(read_cases(options.cases, load_cases()), options.workloads, options.dtypes, device.type)
    backends = tuple(
        name
        for name, reason in available_backends().items()
        if reason is None and (device.type == "cuda" or name == "torch")
    )
    found = suite(options.suite, device.type, backends)
    if options.workloads:
        known = {workload_of(experiment) for experiment in found}
        unknown = sorted(set(options.workloads) - known)
        if unknown:
            raise ValueError(f"--workloads: {', '.join(unknown)} not in this suite; it has {', '.join(sorted(known))}")
        found = [experiment for experiment in found if workload_of(experiment) in options.workloads]
    if options.dtypes:
        found = [experiment for experiment in found if experiment.dtype in options.dtypes]
    if not found:
        raise ValueError("nothing of this suite is left with these --workloads and --dtypes")
    return found


def show_cases(options: argparse.Namespace) -> int:
    cases: dict[str, Case] = read_cases(options.cases, load_cases()) if options.cases else load_cases()
    if options.export_definitions:
        paths = export(options.export_definitions, cases.values())
        print(f"{len(paths)} definitions in {options.export_definitions}")
        return 0
    for case in cases.values():
        frames = f"{case.sink} sink + {case.bank} bank + {case.window} window, top {case.top_k}"
        sizes = f"batch {case.batch}, {case.heads} x {case.head_dim}, grid {case.grid[0]}x{case.grid[1]}"
        print(f"{case.name:26s} {sizes:36s} {frames}  {case.about}")
    return 0


def say(line: str) -> None:
    print(line, flush=True)

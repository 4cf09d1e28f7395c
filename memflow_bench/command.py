"""The command line of the harness."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from memflow_kernels import available_backends

from . import environment
from .cases import load_cases
from .definitions import export
from .providers import PROVIDERS
from .realtime import RealtimeExperiment, run_realtime
from .report import write_report
from .rows import Row, write
from .runner import DTYPES, Experiment, run_experiment
from .streams import StreamExperiment, run_stream
from .suites import SUITES, AnyExperiment, suite
from .table import markdown


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        return options.action(options)
    except ValueError as error:
        print(f"error: {error}")
        return 2


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    actions = top.add_subparsers(required=True, metavar="ACTION")

    run = actions.add_parser("run", help="measure a suite")
    run.add_argument("--suite", choices=SUITES, default="quick")
    run.add_argument("--workloads", nargs="+", metavar="NAME", help="of the suite's workloads only these")
    run.add_argument("--providers", nargs="+", metavar="NAME", help="only these (parts of names will do)")
    run.add_argument("--dtypes", nargs="+", choices=DTYPES, help="only these")
    run.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    run.add_argument("--threads", type=int, help="CPU threads; default: one per core")
    run.add_argument("--warm", action="store_true", help="leave the caches as the last sample left them")
    run.add_argument("--against", metavar="REV", help="compare with the kernels of this commit instead of with peers")
    run.add_argument("-o", "--output", type=Path, help="result file (JSON)")
    run.set_defaults(action=run_suite)

    report = actions.add_parser("report", help="tables and plots of result files")
    report.add_argument("files", nargs="+", type=Path, metavar="FILE")
    report.add_argument("-o", "--output", type=Path, help="folder; default: beside the first file")
    report.set_defaults(action=lambda options: write_report(options.files, options.output))

    cases = actions.add_parser("cases", help="list the cases, or export them as FlashInfer-Bench definitions")
    cases.add_argument("--export-definitions", type=Path, metavar="FOLDER", help="write one JSON file per case")
    cases.set_defaults(action=show_cases)
    return top


def run_suite(options: argparse.Namespace) -> int:
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if options.threads:
        torch.set_num_threads(options.threads)
    experiments = selected(options, device)
    if options.against:
        from .against import compare

        return compare(options.against, experiments, device, options.output)
    facts = environment.record(device)
    dtypes = dict.fromkeys(experiment.dtype for experiment in experiments)
    ceilings = {dtype: environment.ceilings(device, DTYPES[dtype]) for dtype in dtypes}
    providers = chosen_providers(options.providers)
    rows: list[Row] = []
    begin = time.perf_counter()
    for number, experiment in enumerate(experiments, 1):
        print(f"[{number}/{len(experiments)}, {time.perf_counter() - begin:.0f} s] {experiment.title}", flush=True)
        if isinstance(experiment, StreamExperiment):
            rows += run_stream(experiment, device, say)
        elif isinstance(experiment, RealtimeExperiment):
            rows += run_realtime(experiment, device, say)
        else:
            rows += run_experiment(experiment, providers, device, cold=not options.warm, graphs=True, say=say)
        if options.output:
            write(options.output, facts, ceilings, rows)  # what has been measured survives an interruption
    facts["seconds"] = round(time.perf_counter() - begin, 1)
    facts["load_average_after"] = environment.record(device)["load_average"]
    if options.output:
        write(options.output, facts, ceilings, rows)
    print()
    print(markdown(facts, ceilings, rows))
    return 0


def selected(options: argparse.Namespace, device: torch.device) -> list[AnyExperiment]:
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


def workload_of(experiment: AnyExperiment) -> str:
    return experiment.workload if isinstance(experiment, Experiment) else experiment.title.split()[0]


def chosen_providers(wished: list[str] | None) -> list:
    if not wished:
        return list(PROVIDERS.values())
    found = [provider for name, provider in PROVIDERS.items() if any(w.lower() in name.lower() for w in wished)]
    if not found:
        raise ValueError(f"--providers {' '.join(wished)}: none of {', '.join(PROVIDERS)}")
    return found


def show_cases(options: argparse.Namespace) -> int:
    if options.export_definitions:
        paths = export(options.export_definitions)
        print(f"{len(paths)} definitions in {options.export_definitions}")
        return 0
    for case in load_cases().values():
        frames = f"{case.sink} sink + {case.bank} bank + {case.window} window, top {case.top_k}"
        sizes = f"batch {case.batch}, {case.heads} x {case.head_dim}, grid {case.grid[0]}x{case.grid[1]}"
        print(f"{case.name:26s} {sizes:36s} {frames}  {case.about}")
    return 0


def say(line: str) -> None:
    print(line, flush=True)
